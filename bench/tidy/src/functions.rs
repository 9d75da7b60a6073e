//! Finding functions and how long they are.

/// A function in a source file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Line it begins on, from 1.
    pub line: usize,
    /// Lines from its first to its closing brace.
    pub lines: usize,
}

/// The functions in masked code: Rust's `fn`, or C's blocks at the outermost level.
pub fn functions(code: &str, is_c: bool) -> Vec<Function> {
    if is_c {
        c_functions(code)
    } else {
        rust_functions(code)
    }
}

fn rust_functions(code: &str) -> Vec<Function> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("fn ") {
        let word_before = code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let name = word(&code[at + 3..]);
        if word_before || name.is_empty() {
            continue;
        }
        // The body's brace, unless the declaration ends without one. `;` also stands in arrays.
        let mut depth = 0_i32;
        let body = code[at..].char_indices().find(|&(_, c)| {
            match c {
                '(' | '[' => depth += 1,
                ')' | ']' => depth -= 1,
                _ => {}
            }
            depth == 0 && matches!(c, '{' | ';')
        });
        if let Some((offset, '{')) = body {
            found.push(function(code, at, at + offset, name));
        }
    }
    found
}

fn c_functions(code: &str) -> Vec<Function> {
    let (mut found, mut depth, mut outer_start) = (Vec::new(), 0_usize, 0);
    for (at, c) in code.char_indices() {
        match c {
            '{' => {
                let head = code[outer_start..at].trim();
                if depth == 0
                    && let Some(open) = last_group(head)
                {
                    let name = last_word(&head[..open]);
                    let start = outer_start + code[outer_start..at].len()
                        - code[outer_start..at].trim_start().len();
                    found.push(function(code, start, at, name));
                }
                depth += 1;
            }
            '}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    outer_start = at + 1;
                }
            }
            ';' if depth == 0 => outer_start = at + 1,
            _ => {}
        }
    }
    found
}

/// Where the parenthesis opens that `head` ends with.
fn last_group(head: &str) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, c) in head.char_indices().rev() {
        match c {
            ')' => depth += 1,
            '(' if depth == 1 => return Some(at),
            '(' => depth -= 1,
            _ if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

fn function(code: &str, start: usize, open: usize, name: &str) -> Function {
    let mut depth = 0_usize;
    let close = code[open..].char_indices().find(|&(_, c)| {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        depth == 0
    });
    let end = close.map_or(code.len(), |(offset, _)| open + offset);
    Function {
        name: name.to_owned(),
        line: 1 + newlines(&code[..start]),
        lines: 1 + newlines(&code[start..end]),
    }
}

fn newlines(text: &str) -> usize {
    text.bytes().filter(|&b| b == b'\n').count()
}

fn word(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
    &text[..end.unwrap_or(text.len())]
}

fn last_word(text: &str) -> &str {
    let text = text.trim_end();
    let start = text.rfind(|c: char| !c.is_alphanumeric() && c != '_');
    &text[start.map_or(0, |before| before + 1)..]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(code: &str, is_c: bool) -> Vec<(String, usize, usize)> {
        let found = functions(code, is_c);
        found
            .into_iter()
            .map(|f| (f.name, f.line, f.lines))
            .collect()
    }

    #[test]
    fn rust() {
        let code = "trait T {\n    fn declared(&self, x: [u8; 4]);\n}\n\
                    pub fn one() {}\n\
                    fn two<F: Fn(u8) -> u8>(f: F)\nwhere\n    F: Send,\n\
                    {\n    fn inner() {\n    }\n}\n\
                    type P = fn (u8);\n";
        let expected = [("one", 4, 1), ("two", 5, 7), ("inner", 9, 2)];
        let expected = expected.map(|(name, line, lines)| (name.to_owned(), line, lines));
        assert_eq!(summary(code, false), expected);
    }

    #[test]
    fn c() {
        let code = "struct s {\n int x;\n};\nint declared(int x);\n\
                    static __always_inline int\nf(struct s *s)\n{\n if (s) {\n }\n return 0;\n}\n\
                    int table[] = {\n 1,\n};\nSEC()\nint g(void *c) { return 1; }\n";
        let expected = [("f".to_owned(), 5, 7), ("g".to_owned(), 15, 2)];
        assert_eq!(summary(code, true), expected);
    }
}
