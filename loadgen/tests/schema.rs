//! What the clients write is what `schema.json` says.
#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::net::Ipv4Addr;
use std::process::Command;

use loadgen::serve::{Mode, Options, Server};
use serde_json::{Value, json};

/// The part of JSON Schema that the file uses; a keyword it does not know is a failure.
fn check(schema: &Value, root: &Value, value: &Value, at: &str) -> Result<(), String> {
    for (keyword, argument) in schema.as_object().unwrap() {
        let fine = match keyword.as_str() {
            "$schema" | "$defs" | "title" | "description" | "properties" => true,
            "$ref" => {
                let pointer = argument.as_str().unwrap().trim_start_matches('#');
                check(root.pointer(pointer).unwrap(), root, value, at)?;
                true
            }
            "const" => value == argument,
            "enum" => argument.as_array().unwrap().contains(value),
            "type" => match argument {
                Value::Array(names) => names.iter().any(|name| is(value, name)),
                name => is(value, name),
            },
            "required" => {
                let names = argument.as_array().unwrap();
                names
                    .iter()
                    .all(|name| value.get(name.as_str().unwrap()).is_some())
            }
            "items" => {
                for (i, item) in value.as_array().into_iter().flatten().enumerate() {
                    check(argument, root, item, &format!("{at}/{i}"))?;
                }
                true
            }
            "additionalProperties" => {
                for (name, member) in value.as_object().into_iter().flatten() {
                    let at = format!("{at}/{name}");
                    match (schema["properties"].get(name), argument) {
                        (Some(own), _) => check(own, root, member, &at)?,
                        (None, Value::Bool(false)) => return Err(format!("{at}: not in it")),
                        (None, other) => check(other, root, member, &at)?,
                    }
                }
                true
            }
            unknown => panic!("the test does not know {unknown}"),
        };
        if !fine {
            return Err(format!("{at}: {keyword} {argument} but {value}"));
        }
    }
    Ok(())
}

fn is(value: &Value, name: &Value) -> bool {
    match name.as_str().unwrap() {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.is_u64() || value.is_i64(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        other => panic!("the test does not know type {other}"),
    }
}

fn schema() -> Value {
    serde_json::from_str(include_str!("../schema.json")).unwrap()
}

fn results(mode: Mode, arguments: &[&str]) -> Value {
    let server = Server::start(&Options {
        listen: (Ipv4Addr::LOCALHOST, 0).into(),
        mode,
        threads: Some(1),
        cpus: Vec::new(),
        print_peers: false,
    })
    .unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("results.json");
    let output = Command::new(env!("CARGO_BIN_EXE_loadgen"))
        .args(arguments)
        .args(["--to", &server.address().to_string(), "--json"])
        .arg(&file)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

#[test]
fn every_command_writes_what_the_schema_says() {
    let short = ["--duration", "0.3", "--warmup", "0.05"];
    let cases: [(Mode, &[&str]); 6] = [
        (Mode::Echo, &["rr", "--size", "uniform:1-500", "--verify"]),
        (
            Mode::Echo,
            &[
                "rr",
                "--rate",
                "500",
                "--arrivals",
                "poisson",
                "--no-calibration",
            ],
        ),
        (Mode::Echo, &["rr", "--max-sustainable", "p50<1s"]),
        (Mode::Sink, &["stream"]),
        (Mode::Echo, &["connect"]),
        (Mode::Echo, &["idle", "--hold", "0.2"]),
    ];
    let schema = schema();
    for (mode, arguments) in cases {
        let times: &[&str] = if arguments[0] == "idle" { &[] } else { &short };
        let document = results(mode, &[arguments, times].concat());
        check(&schema, &schema, &document, "").unwrap_or_else(|e| panic!("{arguments:?}{e}"));
        let calibrated = document["generator"].get("calibration").is_some();
        assert_eq!(calibrated, !arguments.contains(&"--no-calibration"));
        assert_eq!(
            document.get("search").is_some(),
            arguments.contains(&"--max-sustainable")
        );
    }
}

#[test]
fn what_differs_from_the_schema_is_found() {
    let schema = schema();
    let document = results(Mode::Echo, &["rr", "--duration", "0.2", "--no-calibration"]);
    let broken = |pointer: &str, value: Value| {
        let mut document = document.clone();
        *document.pointer_mut(pointer).unwrap() = value;
        check(&schema, &schema, &document, "").unwrap_err()
    };
    assert!(broken("/schema", json!(2)).contains("/schema"));
    assert!(broken("/metrics/p50_us", json!("fast")).contains("/metrics/p50_us"));
    assert!(broken("/outcomes", json!({"ok": 1})).contains("required"));
    assert!(broken("/generator", json!({"cpu_s": 1.0, "more": 1})).contains("/generator/more"));
}
