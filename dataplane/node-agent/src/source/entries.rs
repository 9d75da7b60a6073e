//! The pods of a file, each read alone: one that cannot be read costs itself.

use redirect::Pod;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::desired::{Entry, Listed, Phase, Unreadable};

/// The list; `pods:` with nothing after it is what is left when the last pod is taken out.
pub(crate) fn list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Entry>, D::Error> {
    let values: Option<Vec<Value>> = Option::deserialize(deserializer)?;
    let values = values.unwrap_or_default().into_iter();
    Ok((1..)
        .zip(values)
        .map(|(number, value)| read(number, value))
        .collect())
}

/// `number` counts from 1 and is for messages.
fn read(number: usize, value: Value) -> Entry {
    let text = |value: &Value, key: &str| value.get(key)?.as_str().map(str::to_owned);
    let uid = text(&value, "uid").unwrap_or_else(|| format!("entry {number}"));
    let host_interface = text(&value, "host_interface");
    match listed(value) {
        Ok(listed) => Entry::Pod(Box::new(listed)),
        Err(reason) => Entry::Unreadable(Unreadable {
            uid,
            host_interface,
            reason,
        }),
    }
}

fn listed(value: Value) -> Result<Listed, String> {
    let Value::Object(mut fields) = value else {
        return Err("must be a mapping with uid, addresses, netns and host_interface".to_owned());
    };
    let phase = optional::<Phase>(&mut fields, "phase")?;
    let started = optional::<String>(&mut fields, "started")?;
    let started = started
        .map(|text| {
            OffsetDateTime::parse(&text, &Rfc3339).map_err(|error| {
                format!("pods.started {text:?}: {error}: must be a time as in 2026-01-31T12:00:00Z")
            })
        })
        .transpose()?;
    let pod = Pod::deserialize(Value::Object(fields)).map_err(|error| format!("pods: {error}"))?;
    Ok(Listed {
        pod,
        phase,
        started,
    })
}

/// Takes a field out that the redirection does not know.
fn optional<'de, T: Deserialize<'de>>(
    fields: &mut Map<String, Value>,
    key: &str,
) -> Result<Option<T>, String> {
    let Some(value) = fields.remove(key) else {
        return Ok(None);
    };
    let shown = value.to_string();
    Option::deserialize(value).map_err(|error| format!("pods.{key} {shown}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct File {
        #[serde(deserialize_with = "list")]
        pods: Vec<Entry>,
    }

    fn entries(pods: &str) -> Vec<Entry> {
        let text = format!("pods:\n{pods}");
        serde_saphyr::from_str::<File>(&text).unwrap().pods
    }

    const SOUND: &str = "{uid: a, namespace: ns, name: p, service_account: s, \
                         addresses: [10.244.1.11], netns: /n, host_interface: va1}";

    #[test]
    fn a_pod_is_read_with_what_is_optional() {
        let more = "phase: Running, started: 2026-01-31T12:00:00Z}";
        let text = format!("- {SOUND}\n- {}", SOUND.replace('}', &format!(", {more}")));
        let entries = entries(&text);
        let [Entry::Pod(first), Entry::Pod(second)] = &entries[..] else {
            panic!("{entries:?}");
        };
        assert_eq!(first.pod, second.pod);
        assert_eq!((first.phase, first.started), (None, None));
        assert_eq!(second.phase, Some(Phase::Running));
        assert!(second.started > first.started);
        assert!(!Phase::Running.is_over() && Phase::Succeeded.is_over() && Phase::Failed.is_over());
    }

    #[test]
    fn what_cannot_be_read_costs_itself_and_says_why() {
        let cases = [
            (SOUND.replace("10.244.1.11", "10.244.1.999"), "invalid IP"),
            (SOUND.replace("addresses", "adresses"), "adresses"),
            (SOUND.replace("[10.244.1.11]", "10.244.1.11"), "sequence"),
            (SOUND.replace("netns: /n, ", ""), "netns"),
            (SOUND.replace("/n", "[]"), "expected path"),
            (SOUND.replace('}', ", phase: Sleeping}"), "Sleeping"),
            (SOUND.replace('}', ", phase: 7}"), "pods.phase 7"),
            (SOUND.replace('}', ", started: yesterday}"), "yesterday"),
            ("just a word".to_owned(), "mapping"),
            ("[a, b]".to_owned(), "mapping"),
            ("12".to_owned(), "mapping"),
            ("null".to_owned(), "mapping"),
            (SOUND.replace("uid: a", "uid: {}"), "string"),
        ];
        for (wrong, expected) in cases {
            let text = format!("- {SOUND}\n- {wrong}\n- {SOUND}");
            let entries = entries(&text);
            let [Entry::Pod(_), Entry::Unreadable(unreadable), Entry::Pod(_)] = &entries[..] else {
                panic!("{wrong}: {entries:?}");
            };
            let reason = &unreadable.reason;
            assert!(reason.contains(expected), "{wrong}: {reason}");
            assert!(!reason.contains('\n'), "{reason}");
            let named = wrong.contains("uid: a");
            let uid = if named { "a" } else { "entry 2" };
            assert_eq!(unreadable.uid, uid);
            let interface = wrong.contains("va1").then_some("va1");
            assert_eq!(unreadable.host_interface.as_deref(), interface, "{wrong}");
        }
    }

    #[test]
    fn no_pods_are_no_error() {
        assert!(entries("").is_empty());
        assert!(entries("  []").is_empty());
    }
}
