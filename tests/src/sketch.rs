//! Topologies for tests: two hosts, a switch and a client, and a container that differs.

/// The built-in server as a container.
pub const EMBEDDED: &str = "embedded: { threads: 2 }\n    ready: { tcp: 6379 }";

/// Redis as a container, kept in memory only.
pub const REDIS: &str = "command: [redis-server, --port, \"6379\", --bind, 0.0.0.0, --save, \"\", \
    --appendonly, \"no\", --protected-mode, \"no\"]\n    ready: { tcp: 6379 }";

/// Memcached as a container.
pub const MEMCACHED: &str = "command: [memcached, -u, root, -l, 0.0.0.0, -p, \"11211\", -U, \"0\", \
    -m, \"64\", -t, \"2\"]\n    ready: { tcp: 11211 }";

/// What a test's topology consists of; [`Sketch::text`] writes it down.
#[derive(Debug, Clone)]
pub struct Sketch {
    /// What the container `store` runs, as the lines of its section.
    pub store: String,
    /// Whether the hosts serve metrics.
    pub metrics: bool,
    /// More keys of the link that checkpoints travel over, one a line.
    pub replication: String,
    /// More keys of the protection, one a line.
    pub protection: String,
    /// The load, one client a line, each as a YAML flow mapping.
    pub clients: Vec<String>,
    /// The faults, each as a YAML flow mapping.
    pub events: Vec<String>,
}

impl Sketch {
    /// A topology without load and without faults.
    pub fn of(store: &str) -> Self {
        Self {
            store: store.to_owned(),
            metrics: true,
            replication: "mtu: 9000".to_owned(),
            protection: String::new(),
            clients: Vec::new(),
            events: Vec::new(),
        }
    }

    /// Twenty connections with 20 MB of data, which keep no pauses.
    pub fn loaded(mut self) -> Self {
        let client = "{ node: client, target: 'store:6379', connections: 20, value-size: 150, \
                      keys: 80000, populate: 20MB, read-ratio: 50% }";
        self.clients.push(client.to_owned());
        self
    }

    /// A fault at a time.
    pub fn with_event(mut self, event: &str) -> Self {
        self.events.push(event.to_owned());
        self
    }

    /// The same with addresses of IPv6, for clients, the container and the checkpoints.
    pub fn text_of_ipv6(&self, lab: &str, mark: &str) -> String {
        self.text(lab, mark)
            .replace("10.77.0.1/24", "'fd00:77::1/64'")
            .replace("10.78.0.1/30", "'fd00:78::1/64'")
            .replace("10.78.0.2/30", "'fd00:78::2/64'")
            .replace("10.77.0.10/24", "'fd00:77::10/64'\n    also: [10.77.0.10/24]")
            .replace("0.0.0.0", "'*', '-::*'")
    }

    /// The topology file of a lab of this name. All its processes inherit the mark.
    pub fn text(&self, lab: &str, mark: &str) -> String {
        let metrics = if self.metrics { ", metrics: '127.0.0.1:9464'" } else { "" };
        let list = |key: &str, items: &[String]| match items {
            [] => String::new(),
            items => format!("{key}:\n  - {}\n", items.join("\n  - ")),
        };
        let lines = |text: &str| match text {
            "" => String::new(),
            text => format!("    {}\n", text.replace('\n', "\n    ")),
        };
        format!(
            "name: {lab}\n\
             nodes:\n\
             \x20 alpha: {{ kind: host{metrics} }}\n\
             \x20 beta: {{ kind: host{metrics} }}\n\
             \x20 client: {{ kind: client }}\n\
             \x20 lan: {{ kind: bridge }}\n\
             links:\n\
             \x20 - endpoints: [alpha:lan, lan:alpha]\n\
             \x20 - endpoints: [beta:lan, lan:beta]\n\
             \x20 - endpoints: [client:eth0, lan:client]\n\
             \x20   addresses: {{ client: 10.77.0.1/24 }}\n\
             \x20 - endpoints: [alpha:repl, beta:repl]\n\
             \x20   addresses: {{ alpha: 10.78.0.1/30, beta: 10.78.0.2/30 }}\n\
             {}\
             containers:\n\
             \x20 store:\n\
             \x20   {}\n\
             \x20   address: 10.77.0.10/24\n\
             \x20   uplink: lan\n\
             \x20   environment: {{ {mark} }}\n\
             protect:\n\
             \x20 - container: store\n\
             \x20   primary: alpha\n\
             \x20   backup: beta\n\
             \x20   over: repl\n\
             {}{}{}",
            lines(&self.replication),
            self.store,
            lines(&self.protection),
            list("clients", &self.clients),
            list("events", &self.events),
        )
    }
}
