//! Errors for people: the whole chain in one line, each cause once.

/// The error and its causes. A cause that its effect has already told is left out.
pub(crate) fn chain(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if line.contains(&text) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&text);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_cause_is_told_once() {
        let io = std::io::Error::from_raw_os_error(2);
        let text = io.to_string();
        let told = anyhow::Error::new(io).context(format!("cannot open x: {text}"));
        assert_eq!(chain(&told.context("no agent")), format!("no agent: cannot open x: {text}"));
        let plain: anyhow::Result<()> = Err(anyhow::anyhow!("b")).context("a");
        assert_eq!(chain(&plain.unwrap_err()), "a: b");
    }
}
