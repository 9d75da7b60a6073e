//! Reading settings from the environment: every error names variable, value and what is allowed.

use std::time::Duration;

/// A setting that cannot be used. `Display` is one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}=`{value}` is not valid: {reason}")]
pub(crate) struct BadSetting {
    pub(crate) name: String,
    pub(crate) value: String,
    pub(crate) reason: String,
}

/// The environment, or a test's idea of it.
pub(crate) struct Environment<'a>(Box<Lookup<'a>>);

type Lookup<'a> = dyn Fn(&str) -> Option<String> + 'a;

impl std::fmt::Debug for Environment<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Environment")
    }
}

impl<'a> Environment<'a> {
    /// The process's environment. Values that are not UTF-8 count as unset.
    pub(crate) fn of_process() -> Self {
        Self(Box::new(|name| std::env::var(name).ok()))
    }

    #[cfg(test)]
    pub(crate) fn of(pairs: &'a [(&'a str, &'a str)]) -> Self {
        Self(Box::new(move |name| {
            pairs
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        }))
    }

    /// The value, if the variable is set (it may be empty).
    pub(crate) fn raw(&self, name: &str) -> Option<String> {
        (self.0)(name)
    }

    /// The value, if the variable is set and not empty.
    pub(crate) fn text(&self, name: &str) -> Option<String> {
        self.raw(name).filter(|value| !value.is_empty())
    }

    pub(crate) fn text_or(&self, name: &str, default: &str) -> String {
        self.text(name).unwrap_or_else(|| default.to_owned())
    }

    fn parse<T>(
        &self,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, BadSetting> {
        let Some(value) = self.text(name) else {
            return Ok(None);
        };
        match parse(&value) {
            Ok(parsed) => Ok(Some(parsed)),
            Err(reason) => Err(BadSetting {
                name: name.to_owned(),
                value,
                reason,
            }),
        }
    }

    pub(crate) fn boolean(&self, name: &str) -> Result<Option<bool>, BadSetting> {
        self.parse(name, |value| match value {
            "true" | "1" => Ok(true),
            "false" | "0" => Ok(false),
            _ => Err("expected true or false".to_owned()),
        })
    }

    pub(crate) fn one_of<T: Copy>(
        &self,
        name: &str,
        allowed: &[(&str, T)],
    ) -> Result<Option<T>, BadSetting> {
        self.parse(name, |value| {
            allowed
                .iter()
                .find(|(key, _)| *key == value)
                .map(|(_, parsed)| *parsed)
                .ok_or_else(|| {
                    let keys: Vec<&str> = allowed.iter().map(|(key, _)| *key).collect();
                    format!("expected {}", keys.join(" or "))
                })
        })
    }

    pub(crate) fn number(
        &self,
        name: &str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<Option<u64>, BadSetting> {
        self.parse(name, |value| {
            value
                .parse()
                .ok()
                .filter(|number| range.contains(number))
                .ok_or_else(|| {
                    format!(
                        "expected a whole number from {} to {}",
                        range.start(),
                        range.end()
                    )
                })
        })
    }

    /// Durations as upstream writes them: `180s`, `5m`, `1h30m`, `250ms`.
    pub(crate) fn duration(&self, name: &str) -> Result<Option<Duration>, BadSetting> {
        self.parse(name, |value| {
            parse_duration(value)
                .ok_or_else(|| "expected a duration such as 250ms, 180s, 5m or 1h30m".to_owned())
        })
    }
}

/// Sum of number-unit pairs. `None`: not a duration, or longer than 10 years.
fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let end = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let unit_ms: u64 = match &rest[..end] {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return None,
        };
        rest = &rest[end..];
        total += Duration::from_millis(number.checked_mul(unit_ms)?);
    }
    let longest = Duration::from_secs(10 * 365 * 86_400);
    (!text.is_empty() && total <= longest).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let cases = [
            ("180s", Some(180_000)),
            ("5m", Some(300_000)),
            ("1h30m", Some(5_400_000)),
            ("250ms", Some(250)),
            ("", None),
            ("5", None),
            ("m5", None),
            ("5 m", None),
            ("99999999999999999999s", None),
            ("200000h", None),
        ];
        for (text, expected) in cases {
            assert_eq!(
                parse_duration(text),
                expected.map(Duration::from_millis),
                "{text}"
            );
        }
    }

    #[test]
    fn errors_name_variable_value_and_range() {
        let environment = Environment::of(&[("A", "yes"), ("B", "70000"), ("C", "soon")]);
        let errors = [
            environment.boolean("A").unwrap_err(),
            environment.number("B", 1..=65_535).unwrap_err(),
            environment.duration("C").unwrap_err(),
        ];
        let texts = errors.map(|error| error.to_string());
        assert_eq!(texts[0], "A=`yes` is not valid: expected true or false");
        assert_eq!(
            texts[1],
            "B=`70000` is not valid: expected a whole number from 1 to 65535"
        );
        assert!(texts[2].starts_with("C=`soon` is not valid: expected a duration"));
    }

    #[test]
    fn unset_and_empty_mean_default() {
        let environment = Environment::of(&[("EMPTY", "")]);
        assert_eq!(environment.boolean("EMPTY"), Ok(None));
        assert_eq!(environment.raw("EMPTY"), Some(String::new()));
        assert_eq!(environment.text_or("UNSET", "x"), "x");
    }
}
