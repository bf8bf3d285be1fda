//! Texts and JSON values made at random, and changes to them.

use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Map, Value, json};

/// One of a list.
pub fn pick<'a, T: ?Sized>(rng: &mut StdRng, list: &[&'a T]) -> &'a T {
    list[rng.random_range(0..list.len())]
}

/// What prompts and files are made of.
const PIECES: [&str; 34] = [
    "a",
    "ab",
    "the ",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u{0}",
    "\u{a0}",
    "\u{3000}",
    "é",
    "e\u{301}",
    "\u{fdfa}",
    "ﬃ",
    "日本",
    "👩‍👩‍👧",
    "🙂",
    "\u{fffd}",
    "\u{fdd0}",
    "\u{feff}",
    "\u{2581}",
    "Ġ",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "<|im_end|>",
    "<|endoftext|>",
    "1234567",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "'s",
    "\u{200d}",
    "{{ x }}",
];

/// A text of up to some thousand characters.
pub fn text(rng: &mut StdRng) -> String {
    let mut text = String::new();
    for _ in 0..rng.random_range(0..30) {
        let piece = if rng.random_bool(0.1) { any_char(rng).to_string() } else { pick(rng, &PIECES).to_owned() };
        let times = if rng.random_bool(0.1) { rng.random_range(1..400) } else { 1 };
        text += &piece.repeat(times);
    }
    text
}

fn any_char(rng: &mut StdRng) -> char {
    char::from_u32(rng.random_range(0..0x11_0000)).unwrap_or('\u{fffd}')
}

/// Changes a text in one place.
pub fn change_text(text: &str, rng: &mut StdRng) -> String {
    let mut chars: Vec<char> = text.chars().collect();
    let at = rng.random_range(0..=chars.len());
    match rng.random_range(0..5) {
        0 => chars.insert(at, any_char(rng)),
        1 => drop(chars.splice(at..at, pick(rng, &PIECES).chars())),
        2 => chars.truncate(at),
        3 if at < chars.len() => drop(chars.remove(at)),
        _ => {
            let rest = chars[at..].to_vec();
            chars.extend(rest);
        }
    }
    chars.into_iter().collect()
}

/// A number that often is where others stop.
pub fn number(rng: &mut StdRng) -> Value {
    match rng.random_range(0..4) {
        0 => json!(rng.random_range(-3..70)),
        1 => json!(pick(rng, &[&0_u64, &(1 << 31), &(1 << 32), &(1 << 53), &(1 << 63), &u64::MAX])),
        2 => json!(pick(rng, &[&-0.0, &0.5, &1.0, &1e-320, &1e308, &-1e300])),
        _ => json!(i64::MIN + rng.random_range(0..2)),
    }
}

fn value(rng: &mut StdRng) -> Value {
    match rng.random_range(0..8) {
        0 => Value::Null,
        1 => Value::Bool(rng.random()),
        2 | 3 => number(rng),
        4 => json!([]),
        5 => json!({}),
        _ => text(rng).into(),
    }
}

/// Changes a value in up to four places; `words` are values that mean something there.
pub fn change(mut changed: Value, words: &[Value], rng: &mut StdRng) -> Value {
    for _ in 0..rng.random_range(1..=4) {
        let other = changed.clone();
        let node = any_node(&mut changed, rng);
        let word = |rng: &mut StdRng| match words.len() {
            0 => value(rng),
            len => words[rng.random_range(0..len)].clone(),
        };
        *node = match (rng.random_range(0..9), node.take()) {
            (0, _) => value(rng),
            (1 | 2, _) => word(rng),
            (3, Value::Array(mut list)) => {
                let at = rng.random_range(0..=list.len());
                let new = if rng.random() { word(rng) } else { list.get(at / 2).cloned().unwrap_or_default() };
                list.insert(at, new);
                list.into()
            }
            (4, Value::Array(mut list)) if !list.is_empty() => {
                list.remove(rng.random_range(0..list.len()));
                list.into()
            }
            (3, Value::Object(mut map)) => {
                map.insert(key(&map, rng), word(rng));
                map.into()
            }
            (4, Value::Object(mut map)) => {
                map.shift_remove(&key(&map, rng));
                map.into()
            }
            (5, old) => (0..rng.random_range(1..60)).fold(old, |inner, _| json!([inner])),
            (6, _) => node_of(other, rng),
            (_, Value::String(text)) => change_text(&text, rng).into(),
            (_, Value::Number(_)) => number(rng),
            (_, old) => old,
        };
    }
    changed
}

fn key(map: &Map<String, Value>, rng: &mut StdRng) -> String {
    let known: Vec<&String> = map.keys().collect();
    if known.is_empty() || rng.random_bool(0.2) {
        return text(rng).chars().take(9).collect();
    }
    let key = known[rng.random_range(0..known.len())];
    if rng.random_bool(0.2) { change_text(key, rng) } else { key.clone() }
}

/// A place somewhere in a value.
fn any_node<'v>(value: &'v mut Value, rng: &mut StdRng) -> &'v mut Value {
    let goes_down = match value {
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => false,
    };
    if !goes_down || rng.random_bool(0.2) {
        return value;
    }
    match value {
        Value::Array(list) => {
            let at = rng.random_range(0..list.len());
            any_node(&mut list[at], rng)
        }
        Value::Object(map) => {
            let at = rng.random_range(0..map.len());
            any_node(map.iter_mut().nth(at).unwrap().1, rng)
        }
        other => other,
    }
}

fn node_of(mut value: Value, rng: &mut StdRng) -> Value {
    any_node(&mut value, rng).take()
}

/// Changes bytes in up to three places.
pub fn damage(bytes: &mut Vec<u8>, rng: &mut StdRng) {
    for _ in 0..rng.random_range(0..=3) {
        if bytes.is_empty() {
            return;
        }
        let at = rng.random_range(0..bytes.len());
        let end = (at + rng.random_range(1..64)).min(bytes.len());
        match rng.random_range(0..6) {
            0 => bytes[at] ^= 1 << rng.random_range(0..8),
            1 => bytes[at] = rng.random(),
            2 => bytes.insert(at, rng.random()),
            3 => drop(bytes.drain(at..end)),
            4 => bytes.truncate(at),
            _ => {
                let again = bytes[at..end].to_vec();
                drop(bytes.splice(at..at, again));
            }
        }
    }
}
