//! Names and addresses as a topology file writes them: `alpha:repl`, `redis:6379`,
//! `10.77.0.10/24`, `02:00:00:00:00:01`.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::units::{BadValue, text_type};

/// One end of a link: an interface of a node, `node:interface`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// The node.
    pub node: String,
    /// The interface's name inside the node.
    pub interface: String,
}

impl Endpoint {
    const WANTED: &str = "an endpoint such as alpha:eth0 (node:interface)";
}

impl FromStr for Endpoint {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match text.split_once(':') {
            Some((node, interface)) if !node.is_empty() && !interface.is_empty() => {
                Ok(Self { node: node.to_owned(), interface: interface.to_owned() })
            }
            _ => Err(BadValue::new(text, Self::WANTED)),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.node, self.interface)
    }
}

text_type!(Endpoint, "Endpoint", ["string"], r"^[a-z0-9-]+:[^:/ ]{1,15}$");

/// Where a client connects to: a port of a container, `container:port`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    /// The container.
    pub container: String,
    /// Its TCP port.
    pub port: u16,
}

impl Target {
    const WANTED: &str = "a target such as redis:6379 (container:port)";
}

impl FromStr for Target {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        text.split_once(':')
            .and_then(|(container, port)| {
                let port = port.parse().ok().filter(|port| *port != 0)?;
                (!container.is_empty()).then(|| Self { container: container.to_owned(), port })
            })
            .ok_or_else(|| BadValue::new(text, Self::WANTED))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.container, self.port)
    }
}

text_type!(Target, "Target", ["string"], r"^[a-z0-9-]+:[0-9]{1,5}$");

/// An address with the size of its subnet: `10.77.0.10/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr {
    /// The address.
    pub ip: IpAddr,
    /// Leading bits that the subnet's addresses share.
    pub prefix: u8,
}

impl Cidr {
    const WANTED: &str = "an address with its prefix length such as 10.77.0.10/24";

    fn bits(ip: IpAddr) -> (u128, u32) {
        match ip {
            IpAddr::V4(ip) => (u128::from(ip.to_bits()), 32),
            IpAddr::V6(ip) => (ip.to_bits(), 128),
        }
    }

    fn shared_bits(self) -> u128 {
        let (bits, width) = Self::bits(self.ip);
        bits.checked_shr(width - u32::from(self.prefix)).unwrap_or(0)
    }

    /// Whether `ip` is in this subnet.
    pub fn contains(self, ip: IpAddr) -> bool {
        self.ip.is_ipv4() == ip.is_ipv4()
            && self.shared_bits() == Self { ip, prefix: self.prefix }.shared_bits()
    }

    /// Whether both describe the same subnet.
    pub fn same_subnet(self, other: Self) -> bool {
        self.prefix == other.prefix && self.contains(other.ip)
    }

    /// The subnet as text: `10.77.0.0/24`.
    pub fn subnet(self) -> String {
        let (bits, width) = Self::bits(self.ip);
        let host = width - u32::from(self.prefix);
        let network = bits.checked_shr(host).and_then(|b| b.checked_shl(host)).unwrap_or(0);
        let ip = match self.ip {
            IpAddr::V4(_) => IpAddr::from((network as u32).to_be_bytes()),
            IpAddr::V6(_) => IpAddr::from(network.to_be_bytes()),
        };
        format!("{ip}/{}", self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        text.split_once('/')
            .and_then(|(ip, prefix)| {
                let ip: IpAddr = ip.parse().ok()?;
                let widest = if ip.is_ipv4() { 32 } else { 128 };
                let prefix = prefix.parse().ok().filter(|prefix| *prefix <= widest)?;
                Some(Self { ip, prefix })
            })
            .ok_or_else(|| BadValue::new(text, Self::WANTED))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

text_type!(Cidr, "Cidr", ["string"], r"^[0-9a-fA-F.:]+/[0-9]{1,3}$");

/// A unicast MAC address: `02:4e:69:00:00:01`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    const WANTED: &str = "a unicast MAC address such as 02:4e:69:00:00:01";

    /// A locally administered address that depends on `name` only (FNV-1a of it), so that every
    /// host of a container comes to the same one without asking.
    pub fn derived_from(name: &str) -> Self {
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let [_, _, a, b, c, d, e, f] = (hash ^ (hash >> 47)).to_be_bytes();
        Self([a & 0xfc | 0x02, b, c, d, e, f])
    }
}

impl FromStr for Mac {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let bad = || BadValue::new(text, Self::WANTED);
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() || mac[0] & 1 == 1 || mac == [0; 6] {
            return Err(bad());
        }
        Ok(Self(mac))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

text_type!(Mac, "Mac", ["string"], r"^([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}$");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_read_and_print() {
        assert_eq!("alpha:repl".parse::<Endpoint>().unwrap().to_string(), "alpha:repl");
        assert_eq!("redis:6379".parse::<Target>().unwrap().to_string(), "redis:6379");
        assert_eq!("10.77.0.10/24".parse::<Cidr>().unwrap().to_string(), "10.77.0.10/24");
        assert_eq!("02:00:00:00:00:0a".parse::<Mac>().unwrap().to_string(), "02:00:00:00:00:0a");
        assert!("alpha".parse::<Endpoint>().is_err());
        assert!("redis:0".parse::<Target>().is_err());
        assert!("redis:70000".parse::<Target>().is_err());
        assert!("10.77.0.10".parse::<Cidr>().is_err());
        assert!("10.77.0.10/33".parse::<Cidr>().is_err());
        assert!("01:00:00:00:00:0a".parse::<Mac>().is_err(), "multicast");
    }

    #[test]
    fn subnets_are_compared_by_their_shared_bits() {
        let cidr: Cidr = "10.77.0.10/24".parse().unwrap();
        assert!(cidr.contains("10.77.0.255".parse().unwrap()));
        assert!(!cidr.contains("10.77.1.1".parse().unwrap()));
        assert!(!cidr.contains("fd00::1".parse().unwrap()));
        assert!(cidr.same_subnet("10.77.0.1/24".parse().unwrap()));
        assert!(!cidr.same_subnet("10.77.0.1/25".parse().unwrap()));
        assert_eq!(cidr.subnet(), "10.77.0.0/24");
        assert_eq!("fd00::7/64".parse::<Cidr>().unwrap().subnet(), "fd00::/64");
        assert_eq!("10.1.2.3/0".parse::<Cidr>().unwrap().subnet(), "0.0.0.0/0");
    }

    #[test]
    fn derived_macs_are_local_unicast_and_differ() {
        let (one, two) = (Mac::derived_from("lab/redis"), Mac::derived_from("lab/redis2"));
        assert_ne!(one, two);
        assert_eq!(one.0[0] & 3, 2);
        assert_eq!(one, Mac::derived_from("lab/redis"));
    }
}
