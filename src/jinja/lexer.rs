//! Template text to tokens, as Jinja 2 does it with `trim_blocks` and `lstrip_blocks`.

use std::fmt::Write as _;

use super::error::{Res, syntax, unsupported};
use super::number;
use super::text::is_space;

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Token {
    Data(String),
    BlockBegin,
    BlockEnd,
    PrintBegin,
    PrintEnd,
    Name(String),
    Str(String),
    Int(i128),
    Float(f64),
    /// An operator or a bracket.
    Op(&'static str),
    End,
}

impl Token {
    /// The token as an error shows it.
    pub fn describe(&self) -> String {
        match self {
            Self::Data(_) => "template data / text".into(),
            Self::BlockBegin => "begin of statement block".into(),
            Self::BlockEnd => "end of statement block".into(),
            Self::PrintBegin => "begin of print statement".into(),
            Self::PrintEnd => "end of print statement".into(),
            Self::Name(name) => name.clone(),
            Self::Str(_) => "string".into(),
            Self::Int(_) => "integer".into(),
            Self::Float(_) => "float".into(),
            Self::Op(op) => (*op).into(),
            Self::End => "end of template".into(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Data,
    /// Before the end of a data text, at a tag.
    Tag,
    Block,
    Print,
}

/// Longer ones first.
const OPERATORS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".",
    ":", "|", ",", ";",
];

#[derive(Debug)]
pub(super) struct Lexer<'s> {
    source: &'s str,
    at: usize,
    line: u32,
    /// Up to where the lines are counted.
    counted: usize,
    state: State,
    brackets: Vec<&'static str>,
    line_starting: bool,
}

/// The template with its line ends as `\n`, and without the last one.
pub(super) fn normalized(source: &str) -> String {
    let mut text = source.replace("\r\n", "\n").replace('\r', "\n");
    if text.ends_with('\n') {
        text.pop();
    }
    text
}

impl<'s> Lexer<'s> {
    /// `source`: see [`normalized`].
    pub fn new(source: &'s str) -> Self {
        Self { source, at: 0, line: 1, counted: 0, state: State::Data, brackets: Vec::new(), line_starting: true }
    }

    /// The next token and its line.
    pub fn next(&mut self) -> Res<(Token, u32)> {
        loop {
            let found = match self.state {
                State::Data => self.data(),
                State::Tag => self.tag()?,
                State::Block | State::Print => self.inside()?,
            };
            if let Some(found) = found {
                return Ok(found);
            }
        }
    }

    fn rest(&self) -> &'s str {
        &self.source[self.at..]
    }

    fn line_here(&mut self) -> u32 {
        self.count(self.at);
        self.line
    }

    fn count(&mut self, to: usize) {
        let breaks = self.source[self.counted..to].matches('\n').count();
        self.line = self.line.saturating_add(u32::try_from(breaks).unwrap_or(u32::MAX));
        self.counted = to;
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start_matches(is_space).len();
    }

    /// Text before a tag that begins at `end`: white space goes as the tag says.
    fn stripped(&self, end: usize, tag_len: usize, is_print: bool) -> &'s str {
        let text = &self.source[self.at..end];
        match self.source.as_bytes().get(end + tag_len) {
            Some(b'-') => return text.trim_end_matches(is_space),
            Some(b'+') => return text,
            _ if is_print => return text,
            _ => {}
        }
        let line_start = text.rfind('\n').map_or(0, |at| at + 1);
        let blank = text[line_start..].chars().all(is_space);
        if blank && (line_start > 0 || self.line_starting) { &text[..line_start] } else { text }
    }

    fn data(&mut self) -> Option<(Token, u32)> {
        let line = self.line_here();
        let rest = self.rest();
        if rest.is_empty() {
            return Some((Token::End, line));
        }
        let begins_tag = |at: &usize| matches!(rest.as_bytes().get(at + 1), Some(b'%' | b'{' | b'#'));
        let tag = rest.match_indices('{').map(|(at, _)| at).find(begins_tag);
        let Some(tag) = tag else {
            self.at = self.source.len();
            return Some((Token::Data(rest.to_owned()), line));
        };
        let end = self.at + tag;
        let text = self.stripped(end, 2, rest.as_bytes()[tag + 1] == b'{');
        self.at = end;
        self.state = State::Tag;
        (!text.is_empty()).then(|| (Token::Data(text.to_owned()), line))
    }

    fn tag(&mut self) -> Res<Option<(Token, u32)>> {
        let line = self.line_here();
        let start = self.rest();
        let body = &start[2..];
        let body = body.strip_prefix(['-', '+']).unwrap_or(body);
        self.at = self.source.len() - body.len();
        match start.as_bytes()[1] {
            b'#' => {
                let Some(end) = body.find("#}") else {
                    if body.is_empty() {
                        // The end is asked for again.
                        self.state = State::Data;
                        return Ok(Some((Token::End, line)));
                    }
                    return Err(syntax("missing end of comment tag").at(line));
                };
                // A sign needs a character of its own, which the beginning may have taken.
                let sign = body.as_bytes()[..end].last().copied();
                self.at += end;
                self.close(sign, true);
                self.state = State::Data;
                Ok(None)
            }
            b'{' => {
                self.state = State::Print;
                Ok(Some((Token::PrintBegin, line)))
            }
            _ => {
                if let Some(text) = self.raw(body, line)? {
                    self.state = State::Data;
                    return Ok((!text.is_empty()).then_some((Token::Data(text), line)));
                }
                self.state = State::Block;
                Ok(Some((Token::BlockBegin, line)))
            }
        }
    }

    /// Goes past `#}`, `%}` or `}}` and the white space that goes with it.
    fn close(&mut self, sign: Option<u8>, trim: bool) {
        self.at += 2;
        let end = self.at;
        match sign {
            Some(b'-') => self.skip_space(),
            Some(b'+') => {}
            _ if trim && self.rest().starts_with('\n') => self.at += 1,
            _ => {}
        }
        self.line_starting = self.at > end && self.source.as_bytes()[self.at - 1] == b'\n';
    }

    /// The text of a raw block, if one begins here.
    fn raw(&mut self, body: &'s str, line: u32) -> Res<Option<String>> {
        let Some(after) = body.trim_start_matches(is_space).strip_prefix("raw") else { return Ok(None) };
        let after = after.trim_start_matches(is_space);
        let text = match after.strip_prefix("-%}") {
            Some(text) => text.trim_start_matches(is_space),
            None => match after.strip_prefix("%}") {
                Some(text) => text,
                None => return Ok(None),
            },
        };
        self.at = self.source.len() - text.len();
        self.line_starting = self.source[..self.at].ends_with('\n');
        for (begin, _) in text.match_indices("{%") {
            let inner = &text[begin + 2..];
            let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start_matches(is_space);
            let Some(inner) = inner.strip_prefix("endraw") else { continue };
            let inner = inner.trim_start_matches(is_space);
            let (sign, inner) = match inner.as_bytes().first() {
                Some(sign @ (b'-' | b'+')) => (Some(*sign), &inner[1..]),
                _ => (None, inner),
            };
            if inner.starts_with("%}") {
                let kept = self.stripped(self.at + begin, 2, false).to_owned();
                self.at = self.source.len() - inner.len();
                self.close(sign, true);
                return Ok(Some(kept));
            }
        }
        if text.is_empty() {
            return Ok(Some(String::new()));
        }
        Err(syntax("missing end of raw directive").at(line))
    }

    fn inside(&mut self) -> Res<Option<(Token, u32)>> {
        let line = self.line_here();
        if self.brackets.is_empty() {
            let rest = self.rest();
            let (end, token) =
                if self.state == State::Block { ("%}", Token::BlockEnd) } else { ("}}", Token::PrintEnd) };
            let sign = rest.as_bytes().first().copied().filter(|&b| b == b'-' || b == b'+' && end == "%}");
            if rest[usize::from(sign.is_some())..].starts_with(end) {
                self.at += usize::from(sign.is_some());
                self.close(sign, end == "%}");
                self.state = State::Data;
                return Ok(Some((token, line)));
            }
        }
        self.skip_space();
        let line = self.line_here();
        let rest = self.rest();
        let Some(first) = rest.chars().next() else { return Ok(Some((Token::End, line))) };
        if self.brackets.is_empty() && self.ends_here() {
            return Ok(None);
        }
        let token = if first.is_ascii_digit() {
            self.number().map_err(|error| error.at(line))?
        } else if first == '\'' || first == '"' {
            self.string().map_err(|error| error.at(line))?
        } else if is_name_char(first) {
            let end = rest.find(|c| !is_name_char(c)).unwrap_or(rest.len());
            if !(first.is_alphabetic() || first == '_') {
                return Err(syntax("invalid character in identifier").at(line));
            }
            self.at += end;
            Token::Name(rest[..end].to_owned())
        } else {
            let Some(op) = OPERATORS.iter().find(|op| rest.starts_with(**op)) else {
                return Err(syntax(format!("unexpected char `{first}`")).at(line));
            };
            self.bracket(op).map_err(|error| error.at(line))?;
            self.at += op.len();
            Token::Op(op)
        };
        Ok(Some((token, line)))
    }

    fn ends_here(&self) -> bool {
        let rest = self.rest();
        if self.state == State::Block {
            ["%}", "-%}", "+%}"].iter().any(|end| rest.starts_with(end))
        } else {
            ["}}", "-}}"].iter().any(|end| rest.starts_with(end))
        }
    }

    fn bracket(&mut self, op: &str) -> Res<()> {
        match op {
            "{" => self.brackets.push("}"),
            "(" => self.brackets.push(")"),
            "[" => self.brackets.push("]"),
            "}" | ")" | "]" => match self.brackets.pop() {
                None => return Err(syntax(format!("unexpected `{op}`"))),
                Some(expected) if expected != op => {
                    return Err(syntax(format!("unexpected `{op}`, expected `{expected}`")));
                }
                Some(_) => {}
            },
            _ => {}
        }
        Ok(())
    }

    fn number(&mut self) -> Res<Token> {
        let rest = self.rest().as_bytes();
        let digits = |from: usize, is_digit: fn(&u8) -> bool| {
            let mut at = from;
            while rest.get(at).is_some_and(is_digit)
                || (at > from && rest.get(at) == Some(&b'_') && rest.get(at + 1).is_some_and(is_digit))
            {
                at += 1;
            }
            at
        };
        let decimal = |from| digits(from, u8::is_ascii_digit);
        let whole = decimal(0);
        let mut end = whole;
        let after_dot = self.at > 0 && self.source.as_bytes()[self.at - 1] == b'.';
        if !after_dot {
            if rest.get(end) == Some(&b'.') && decimal(end + 1) > end + 1 {
                end = decimal(end + 1);
            }
            if matches!(rest.get(end), Some(b'e' | b'E')) {
                let sign = usize::from(matches!(rest.get(end + 1), Some(b'+' | b'-')));
                if decimal(end + 1 + sign) > end + 1 + sign {
                    end = decimal(end + 1 + sign);
                }
            }
        }
        if end > whole {
            let text = self.rest()[..end].replace('_', "");
            self.at += end;
            return Ok(Token::Float(text.parse().unwrap_or(f64::NAN)));
        }
        let based = |is_digit: fn(&u8) -> bool| {
            let from = 2 + usize::from(rest.get(2) == Some(&b'_'));
            let end = digits(from, is_digit);
            (end > from).then_some(end)
        };
        let based = match rest.get(..2) {
            Some(b"0x" | b"0X") => based(u8::is_ascii_hexdigit).map(|end| (16, end)),
            Some(b"0o" | b"0O") => based(|b| (b'0'..=b'7').contains(b)).map(|end| (8, end)),
            Some(b"0b" | b"0B") => based(|b| matches!(b, b'0' | b'1')).map(|end| (2, end)),
            _ => None,
        };
        let (base, start, end) = match based {
            Some((base, end)) => (base, 2, end),
            // Without a point, zeros do not lead a number.
            None if rest[0] == b'0' => (10, 0, digits(0, |b| *b == b'0')),
            None => (10, 0, whole),
        };
        let text = self.rest()[start..end].replace('_', "");
        self.at += end;
        i128::from_str_radix(&text, base).map(Token::Int).map_err(|_| number::too_large())
    }

    fn string(&mut self) -> Res<Token> {
        let rest = self.rest();
        let quote = rest.as_bytes()[0];
        let mut text = String::new();
        let mut chars = rest.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            if c as u32 == u32::from(quote) {
                self.at += at + 1;
                return Ok(Token::Str(text));
            }
            if c != '\\' {
                text.push(c);
                continue;
            }
            let Some((_, escaped)) = chars.next() else { break };
            let mut hex = |digits: usize| -> Res<char> {
                let code: String = chars.by_ref().take(digits).map(|(_, c)| c).collect();
                let code =
                    Some(code).filter(|code| code.len() == digits && code.bytes().all(|b| b.is_ascii_hexdigit()));
                let Some(code) = code.and_then(|code| u32::from_str_radix(&code, 16).ok()) else {
                    return Err(syntax("truncated escape in a string"));
                };
                match char::from_u32(code) {
                    Some(c) => Ok(c),
                    None if code <= 0xFFFF => Err(unsupported("half of a surrogate pair in a string")),
                    None => Err(syntax("illegal Unicode character in a string")),
                }
            };
            match escaped {
                '\n' => {}
                'n' => text.push('\n'),
                't' => text.push('\t'),
                'r' => text.push('\r'),
                '\\' | '\'' | '"' => text.push(escaped),
                'a' => text.push('\x07'),
                'b' => text.push('\x08'),
                'f' => text.push('\x0C'),
                'v' => text.push('\x0B'),
                'x' => text.push(hex(2)?),
                'u' => text.push(hex(4)?),
                'U' => text.push(hex(8)?),
                'N' => return Err(unsupported("`\\N{...}` in a string")),
                '0'..='7' => {
                    let mut code = escaped as u32 - '0' as u32;
                    for _ in 0..2 {
                        let mut ahead = chars.clone();
                        let Some(digit) = ahead.next().and_then(|(_, c)| c.to_digit(8)) else { break };
                        code = code * 8 + digit;
                        chars = ahead;
                    }
                    text.extend(char::from_u32(code));
                }
                // Jinja 2 writes what is not ASCII as an escape first, so that only that one's backslash is escaped.
                c if !c.is_ascii() => {
                    let code = c as u32;
                    let _ = match code {
                        0x80..=0xFF => write!(text, "\\x{code:02x}"),
                        0x100..=0xFFFF => write!(text, "\\u{code:04x}"),
                        _ => write!(text, "\\U{code:08x}"),
                    };
                }
                c => text.extend(['\\', c]),
            }
        }
        Err(syntax(format!("unexpected char `{}`", char::from(quote))))
    }
}

fn is_name_char(c: char) -> bool {
    c == '_' || c.is_alphanumeric()
}
