//! An etcd as the arbiter: the newest grant of a container is the value of one key.
//!
//! ```text
//! host                                   etcd, over its JSON gateway
//!   POST /v3/kv/range (linearizable) ->   what was granted last, and in which revision
//!   decided here, by the rule that the witness has (Grants)
//!   POST /v3/kv/txn                  ->   put the new grant, if the key is still of that revision
//! ```
//! The rule is pure, and the transaction makes sure that it was applied to the newest grant: of two
//! that ask at once, one finds that the key has changed and decides anew. So generations only grow,
//! and nothing is granted twice (FO-1). A host whose answer was lost asks again and is told that it has
//! the grant already. An etcd that was put back to an older copy of its data has forgotten grants, and
//! nothing here can notice that.

use anyhow::{Context, Result, anyhow, bail};
use replicator::Generation;
use replicator::protocol::arbiter::{Arbiter, Claim, Grant, Grants, Verdict};
use serde_json::{Value, json};
use std::time::Duration;

/// How long one member may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often a decision is made anew, as another one came in between: far more often than there are
/// hosts to ask.
const ATTEMPTS: usize = 16;

/// The grants of a lab, in an etcd.
#[derive(Clone, Debug)]
pub(super) struct Etcd {
    members: Vec<String>,
    lab: String,
    agent: ureq::Agent,
}

/// What the key of a container holds.
struct Entry {
    /// 0 if there is no such key.
    revision: i64,
    grant: Option<Grant>,
}

impl Etcd {
    /// That with these members, for a lab.
    pub(super) fn new(members: &[String], lab: &str) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(PATIENCE))
            .http_status_as_error(false)
            .proxy(None)
            .build();
        Self { members: members.to_vec(), lab: lab.into(), agent: config.into() }
    }

    /// Decides about a claim, and has written a grant down before it is given. Blocks.
    ///
    /// # Errors
    /// No member answers, or what they say makes no sense: nothing was decided.
    pub(super) fn decide(&self, claim: &Claim) -> Result<Verdict> {
        let key = format!("nilicon/{}/{}", self.lab, claim.container);
        for _ in 0..ATTEMPTS {
            let Entry { revision, grant } = self.read(&key)?;
            let mut grants = Grants::default();
            if let Some(grant) = &grant {
                grants.remember(&claim.container, grant.clone());
            }
            let verdict = grants.decide(claim);
            let next = grants.newest(&claim.container).cloned();
            if next == grant {
                return Ok(verdict);
            }
            let next = next.context("a claim was granted without a grant")?;
            if self.replace(&key, revision, &next)? {
                return Ok(verdict);
            }
        }
        bail!("{key} has changed {ATTEMPTS} times while it was decided about it")
    }

    fn read(&self, key: &str) -> Result<Entry> {
        let answer = self.ask("range", &json!({ "key": encode(key.as_bytes()) }))?;
        let Some(found) = answer["kvs"].get(0) else {
            return Ok(Entry { revision: 0, grant: None });
        };
        let revision = found["mod_revision"].as_str().and_then(|text| text.parse().ok());
        let text = found["value"].as_str().and_then(decode);
        let grant = text.as_deref().and_then(parse);
        let what = || format!("the key {key} of the etcd holds no grant: {found}");
        Ok(Entry { revision: revision.with_context(what)?, grant: Some(grant.with_context(what)?) })
    }

    /// Puts a grant if the key is still of this revision; whether it was.
    fn replace(&self, key: &str, revision: i64, grant: &Grant) -> Result<bool> {
        let value = json!({ "generation": grant.generation.0, "host": grant.host }).to_string();
        let (key, value) = (encode(key.as_bytes()), encode(value.as_bytes()));
        let unchanged = json!({
            "key": key, "target": "MOD", "result": "EQUAL", "mod_revision": revision.to_string(),
        });
        let put = json!({ "request_put": { "key": key, "value": value } });
        let answer = self.ask("txn", &json!({ "compare": [unchanged], "success": [put] }))?;
        Ok(answer["succeeded"] == true)
    }

    /// The answer of the first member that gives one.
    fn ask(&self, what: &str, body: &Value) -> Result<Value> {
        let mut silent = Vec::new();
        for member in &self.members {
            match self.ask_one(&format!("{member}/v3/kv/{what}"), body) {
                Ok(answer) => return Ok(answer),
                Err(error) => silent.push(format!("{member}: {error:#}")),
            }
        }
        Err(anyhow!("no member of the etcd answers: {}", silent.join("; ")))
    }

    fn ask_one(&self, url: &str, body: &Value) -> Result<Value> {
        let mut answer = self.agent.post(url).send(body.to_string())?;
        let status = answer.status();
        let text = answer.body_mut().read_to_string()?;
        if !status.is_success() {
            bail!("{status}: {}", text.trim());
        }
        serde_json::from_str(&text).with_context(|| format!("no JSON: {text:?}"))
    }
}

fn parse(value: &[u8]) -> Option<Grant> {
    let value: Value = serde_json::from_slice(value).ok()?;
    Some(Grant {
        generation: Generation(value["generation"].as_u64()?),
        host: value["host"].as_str()?.to_owned(),
    })
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// As base64, which keys and values are written in (RFC 4648).
fn encode(bytes: &[u8]) -> String {
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let at = |i: usize| u32::from(three.get(i).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for i in 0..4 {
            let letter = ALPHABET[(bits >> (18 - 6 * i)) as usize & 63];
            text.push(if i <= three.len() { letter.into() } else { '=' });
        }
    }
    text
}

/// What [`encode`] has written; none if it has not.
fn decode(text: &str) -> Option<Vec<u8>> {
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0u32, 0);
    for letter in text.trim_end_matches('=').bytes() {
        bits = bits << 6 | ALPHABET.iter().position(|l| *l == letter)? as u32;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests;
