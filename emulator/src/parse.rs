//! PTX text to items: scopes, labels, declarations and instructions. Names are not resolved here.

use std::collections::HashMap;

use crate::LoadError;

/// Where a variable or a memory access lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Global,
    Shared,
    /// Shared memory of any block of the cluster.
    Cluster,
    Local,
    Param,
    Const,
    Generic,
}

/// A declared variable: `.shared .align 16 .b8 tile[1024]`.
#[derive(Clone, Debug)]
pub(crate) struct Variable {
    pub name: String,
    pub space: Space,
    pub align: u64,
    pub size: u64,
    pub external: bool,
    pub initial: Vec<u8>,
}

/// A place in the kernel's source, from `.loc`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Loc {
    pub file: u32,
    pub line: u32,
    /// File and line of the call that was inlined here.
    pub inlined: Option<(u32, u32)>,
}

/// An operand as written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Operand {
    /// A register, special register, variable, function or label.
    Name(String),
    /// `!%p1`
    Not(String),
    Integer(u64),
    /// Bits of a floating-point literal; `double` says which width.
    Float {
        bits: u64,
        double: bool,
    },
    /// `[base+offset]`
    Address {
        base: Box<Operand>,
        offset: i64,
    },
    /// `[base, {x, y}]`: a place in a tensor
    Tensor {
        base: Box<Operand>,
        coordinates: Vec<Operand>,
    },
    /// `{a, b}`, and `(a, b)` of a call
    List(Vec<Operand>),
    /// `%r1|%p1`
    Pair(Box<Operand>, Box<Operand>),
    /// `_`
    Sink,
}

/// An instruction as written.
#[derive(Clone, Debug)]
pub(crate) struct Statement {
    pub line: u32,
    pub guard: Option<(String, bool)>,
    pub opcode: String,
    pub modifiers: Vec<String>,
    pub operands: Vec<Operand>,
    pub text: String,
}

/// One element of a function's body.
#[derive(Clone, Debug)]
pub(crate) enum Item {
    Open,
    Close,
    Label(String),
    Registers { ty: String, names: Vec<String> },
    Variable(Variable),
    Targets(Vec<String>),
    Loc(Loc),
    Instruction(Statement),
}

/// A kernel (`.entry`) or a device function (`.func`).
#[derive(Clone, Debug)]
pub(crate) struct Function {
    pub name: String,
    pub entry: bool,
    pub returns: Vec<Variable>,
    pub params: Vec<Variable>,
    pub body: Vec<Item>,
    /// `.maxntid`: the largest block this kernel was compiled for.
    pub max_threads: Option<u32>,
    /// `.maxnreg`
    pub max_registers: Option<u32>,
    /// `.minnctapersm`: blocks that a multiprocessor has room for.
    pub min_blocks: Option<u32>,
    /// `.reqnctapercluster`: the size of a cluster that this kernel was compiled for.
    pub cluster: Option<[u32; 3]>,
}

/// A function whose body has not been read yet.
#[derive(Clone, Debug)]
struct Unread {
    function: Function,
    /// From its first brace to its last.
    text: String,
    line: u32,
}

/// A parsed module.
#[derive(Clone, Debug, Default)]
pub(crate) struct Source {
    /// `.target`: its first word.
    pub target: String,
    pub files: HashMap<u32, String>,
    pub variables: Vec<Variable>,
    /// Variables that nothing is known of but why they could not be read.
    pub unreadable: Vec<LoadError>,
    /// As far as [`Source::read`].
    pub functions: Vec<Function>,
    unread: Vec<Unread>,
}

impl Source {
    /// The names of the kernels.
    pub(crate) fn kernels(&self) -> impl Iterator<Item = &str> {
        let all = self.functions.iter().chain(self.unread.iter().map(|unread| &unread.function));
        all.filter(|function| function.entry).map(|function| function.name.as_str())
    }

    /// Reads the bodies of a function and of those that it calls, as far as they are in the module.
    pub(crate) fn read(&mut self, name: &str) -> Result<(), LoadError> {
        let mut wanted = vec![name.to_string()];
        while let Some(name) = wanted.pop() {
            let Some(at) = self.unread.iter().position(|unread| unread.function.name == name) else { continue };
            let unread = &self.unread[at];
            let body = body(&unread.text, unread.line)?;
            let called = body.iter().filter_map(|item| match item {
                Item::Instruction(s) if s.opcode == "call" => {
                    s.operands.iter().find_map(|o| if let Operand::Name(name) = o { Some(name.clone()) } else { None })
                }
                _ => None,
            });
            wanted.extend(called);
            let Unread { function, .. } = self.unread.swap_remove(at);
            self.functions.push(Function { body, ..function });
        }
        Ok(())
    }
}

fn error(line: u32, text: &str, reason: impl Into<String>) -> LoadError {
    LoadError { line, text: text.trim().to_string(), reason: reason.into() }
}

/// The text with comments blanked out, lines kept.
fn without_comments(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let (mut i, mut quoted) = (0, false);
    while i < bytes.len() {
        let rest = &bytes[i..];
        if !quoted && rest.starts_with(b"//") {
            while i < bytes.len() && bytes[i] != b'\n' {
                i += 1;
            }
        } else if !quoted && rest.starts_with(b"/*") {
            while i < bytes.len() && !bytes[i..].starts_with(b"*/") {
                if bytes[i] == b'\n' {
                    out.push(b'\n');
                }
                i += 1;
            }
            i += 2;
        } else {
            quoted ^= bytes[i] == b'"';
            out.push(bytes[i]);
            i += 1;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Splits at commas outside brackets.
fn split_commas(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0i32, 0, Vec::new());
    for (i, c) in text.char_indices() {
        match c {
            '[' | '{' | '(' => depth += 1,
            ']' | '}' | ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(text[start..i].trim());
                start = i + 1;
            }
            _ => {}
        }
    }
    if !text[start..].trim().is_empty() {
        parts.push(text[start..].trim());
    }
    parts
}

fn integer(text: &str) -> Option<u64> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let digits = digits.trim_end_matches('U');
    let value = if let Some(hex) = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        u64::from_str_radix(hex, 16).ok()?
    } else if let Some(binary) = digits.strip_prefix("0b") {
        u64::from_str_radix(binary, 2).ok()?
    } else {
        digits.parse::<u64>().ok()?
    };
    Some(if negative { value.wrapping_neg() } else { value })
}

fn operand(text: &str) -> Option<Operand> {
    let text = text.trim();
    if text == "_" {
        return Some(Operand::Sink);
    }
    if let Some(inner) = text.strip_prefix('{').and_then(|t| t.strip_suffix('}')) {
        return split_commas(inner).into_iter().map(operand).collect::<Option<_>>().map(Operand::List);
    }
    if let Some(inner) = text.strip_prefix('(').and_then(|t| t.strip_suffix(')')) {
        return split_commas(inner).into_iter().map(operand).collect::<Option<_>>().map(Operand::List);
    }
    if let Some(inner) = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')) {
        if let Some((base, coordinates)) = inner.split_once(',') {
            let Operand::List(coordinates) = operand(coordinates)? else { return None };
            return Some(Operand::Tensor { base: Box::new(operand(base)?), coordinates });
        }
        let (base, offset) = match inner.split_once('+') {
            Some((base, offset)) => (base, integer(offset.trim())? as i64),
            None => (inner, 0),
        };
        return Some(Operand::Address { base: Box::new(operand(base)?), offset });
    }
    if let Some((a, b)) = text.split_once('|') {
        return Some(Operand::Pair(Box::new(operand(a)?), Box::new(operand(b)?)));
    }
    if let Some(name) = text.strip_prefix('!') {
        return Some(Operand::Not(name.trim().to_string()));
    }
    if let Some(hex) = text.strip_prefix("0f").or_else(|| text.strip_prefix("0F")) {
        return u32::from_str_radix(hex, 16).ok().map(|b| Operand::Float { bits: b.into(), double: false });
    }
    if let Some(hex) = text.strip_prefix("0d").or_else(|| text.strip_prefix("0D")) {
        return u64::from_str_radix(hex, 16).ok().map(|bits| Operand::Float { bits, double: true });
    }
    let first = text.chars().next()?;
    if first.is_ascii_digit() || first == '-' {
        if let Some(value) = integer(text) {
            return Some(Operand::Integer(value));
        }
        return text.parse::<f64>().ok().map(|v| Operand::Float { bits: v.to_bits(), double: true });
    }
    if text.chars().all(|c| c.is_ascii_alphanumeric() || "_$%.".contains(c)) {
        return Some(Operand::Name(text.to_string()));
    }
    None
}

/// Bytes of a type named in a declaration.
fn type_bytes(name: &str) -> Option<u64> {
    Some(match name {
        "b8" | "u8" | "s8" => 1,
        "b16" | "u16" | "s16" | "f16" | "bf16" => 2,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => 4,
        "b64" | "u64" | "s64" | "f64" => 8,
        "b128" => 16,
        _ => return None,
    })
}

/// `.visible .global .align 4 .b8 table[8] = {1, 2}`
fn variable(text: &str, line: u32) -> Result<Variable, LoadError> {
    let bad = |why: &str| error(line, text, why);
    let (declaration, initial) = match text.split_once('=') {
        Some((a, b)) => (a, Some(b)),
        None => (text, None),
    };
    let mut v =
        Variable { name: String::new(), space: Space::Param, align: 1, size: 0, external: false, initial: Vec::new() };
    let (mut unit, mut words) = (None, declaration.split_whitespace().peekable());
    let mut name = String::new();
    while let Some(word) = words.next() {
        match word {
            ".align" => v.align = words.next().and_then(|w| w.parse().ok()).ok_or_else(|| bad("bad .align"))?,
            ".global" => v.space = Space::Global,
            ".shared" => v.space = Space::Shared,
            ".local" => v.space = Space::Local,
            ".param" => v.space = Space::Param,
            ".const" => v.space = Space::Const,
            ".extern" => v.external = true,
            ".ptr" => {}
            _ if word.starts_with('.') => unit = type_bytes(&word[1..]).or(unit),
            _ => name.push_str(word),
        }
    }
    let unit = unit.ok_or_else(|| bad("a declaration without a known type"))?;
    let mut count = 1;
    let mut parts = name.split('[');
    v.name = parts.next().unwrap_or_default().to_string();
    for part in parts {
        let n = part.trim_end_matches(']');
        count *= if n.is_empty() { 0 } else { n.parse::<u64>().map_err(|_| bad("bad array size"))? };
    }
    v.size = unit * count;
    v.align = v.align.max(unit);
    if let Some(values) = initial {
        let values = values.trim().trim_start_matches('{').trim_end_matches('}');
        for value in split_commas(values) {
            let bits = match operand(value) {
                Some(Operand::Integer(i)) => i,
                Some(Operand::Float { bits, double }) if double == (unit == 8) => bits,
                _ => return Err(bad("only numbers may initialise a variable")),
            };
            v.initial.extend_from_slice(&bits.to_le_bytes()[..unit as usize]);
        }
        v.initial.resize(v.size as usize, 0);
    }
    Ok(v)
}

/// An instruction: `@%p1 ld.global.f32 %f1, [%rd1+4]`
fn statement(text: &str, line: u32) -> Result<Statement, LoadError> {
    let whole = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut rest = whole.as_str();
    let mut guard = None;
    if let Some(guarded) = rest.strip_prefix('@') {
        let (name, after) =
            guarded.split_once(' ').ok_or_else(|| error(line, text, "a guard without an instruction"))?;
        guard = Some(match name.strip_prefix('!') {
            Some(name) => (name.to_string(), true),
            None => (name.to_string(), false),
        });
        rest = after.trim();
    }
    let (head, tail) = rest.split_once(' ').unwrap_or((rest, ""));
    let mut words = head.split('.');
    let opcode = words.next().unwrap_or_default().to_string();
    let modifiers = words.map(str::to_string).collect();
    let operands = split_commas(tail)
        .into_iter()
        .map(|o| operand(o).ok_or_else(|| error(line, text, format!("unknown operand `{o}`"))))
        .collect::<Result<_, _>>()?;
    Ok(Statement { line, guard, opcode, modifiers, operands, text: whole })
}

/// `.loc 1 12 3` or `.loc 1 12 3, function_name $L__info_string0, inlined_at 1 40 5`
fn loc(text: &str) -> Loc {
    fn numbers(text: &str) -> (u32, u32) {
        let mut n = text.split_whitespace().map(|w| w.trim_end_matches(',').parse().unwrap_or(0));
        (n.next().unwrap_or(0), n.next().unwrap_or(0))
    }
    let (file, line) = numbers(text.trim_start_matches(".loc"));
    let inlined = text.split_once("inlined_at").map(|(_, at)| numbers(at));
    Loc { file, line, inlined }
}

/// The names in `.reg .b32 %r<4>` (expanded) or `.reg .pred p, q`.
fn registers(text: &str, line: u32) -> Result<Item, LoadError> {
    let bad = || error(line, text, "bad register declaration");
    let rest = text.trim_start_matches(".reg").trim();
    let (ty, list) = rest.split_once(char::is_whitespace).ok_or_else(bad)?;
    let mut names = Vec::new();
    for name in split_commas(list) {
        match name.split_once('<') {
            Some((stem, count)) => {
                let count: u32 = count.trim_end_matches('>').parse().map_err(|_| bad())?;
                names.extend((0..count).map(|i| format!("{stem}{i}")));
            }
            None => names.push(name.to_string()),
        }
    }
    Ok(Item::Registers { ty: ty.trim_start_matches('.').to_string(), names })
}

/// `.visible .func (.param .b32 out) name(.param .b64 a)` or `.visible .entry name(...) .maxntid 256, 1, 1`
fn header(text: &str, line: u32) -> Result<Function, LoadError> {
    let bad = || error(line, text, "bad function header");
    let entry = text.contains(".entry");
    let mut rest = text.split_once(if entry { ".entry" } else { ".func" }).ok_or_else(bad)?.1.trim();
    let parameters =
        |list: &str| split_commas(list).into_iter().map(|p| variable(p, line)).collect::<Result<Vec<_>, _>>();
    let mut returns = Vec::new();
    if let Some(after) = rest.strip_prefix('(') {
        let (list, after) = after.split_once(')').ok_or_else(bad)?;
        returns = parameters(list)?;
        rest = after.trim();
    }
    let (name, params, attributes) = match rest.split_once('(') {
        Some((name, after)) => {
            let (list, attributes) = after.split_once(')').ok_or_else(bad)?;
            (name, parameters(list)?, attributes)
        }
        None => (rest, Vec::new(), ""),
    };
    let attribute = |name: &str| -> Option<Vec<u32>> {
        let (_, after) = attributes.split_once(name)?;
        let end = after.find('.').unwrap_or(after.len());
        Some(after[..end].split(',').filter_map(|n| n.trim().parse().ok()).collect())
    };
    let max_threads = attribute(".maxntid").or_else(|| attribute(".reqntid")).map(|n| n.iter().product());
    let max_registers = attribute(".maxnreg").and_then(|n| n.first().copied());
    let min_blocks = attribute(".minnctapersm").and_then(|n| n.first().copied());
    let size = |n: Vec<u32>| [0, 1, 2].map(|i| n.get(i).copied().unwrap_or(1));
    let cluster = attribute(".reqnctapercluster").map(size);
    let name = name.trim().to_string();
    Ok(Function { name, entry, returns, params, body: Vec::new(), max_threads, max_registers, min_blocks, cluster })
}

struct Cursor<'a> {
    text: &'a str,
    at: usize,
    line: u32,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn advance(&mut self, n: usize) -> &'a str {
        let part = &self.text[self.at..self.at + n];
        self.line += part.bytes().filter(|&b| b == b'\n').count() as u32;
        self.at += n;
        part
    }

    fn skip_space(&mut self) {
        let n = self.rest().len() - self.rest().trim_start().len();
        self.advance(n);
    }

    /// Up to the first byte outside parentheses that `stop` accepts; that byte is not consumed.
    fn until(&mut self, stop: impl Fn(u8) -> bool) -> Option<&'a str> {
        let mut depth = 0;
        for (i, b) in self.rest().bytes().enumerate() {
            match b {
                b'(' => depth += 1,
                b')' => depth -= 1,
                _ => {}
            }
            if depth == 0 && stop(b) {
                return Some(self.advance(i));
            }
        }
        None
    }

    /// The rest of this line.
    fn line(&mut self) -> &'a str {
        let end = self.rest().find('\n').unwrap_or(self.rest().len());
        self.advance(end)
    }

    /// From this brace to the one that closes it.
    fn braces(&mut self) -> Option<&'a str> {
        let mut depth = 0;
        for (i, b) in self.rest().bytes().enumerate() {
            match b {
                b'{' => depth += 1,
                b'}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return Some(self.advance(i + 1));
            }
        }
        None
    }
}

/// Reads all of a module but the functions' bodies.
pub(crate) fn outline(text: &str) -> Result<Source, LoadError> {
    let text = without_comments(text);
    let mut source = Source::default();
    let mut c = Cursor { text: &text, at: 0, line: 1 };
    loop {
        c.skip_space();
        let (rest, line) = (c.rest(), c.line);
        let Some(first) = rest.bytes().next() else { break };
        let ended = || error(line, rest.lines().next().unwrap_or_default(), "the text ends inside this");
        let word = rest.split(|ch: char| ch.is_whitespace()).next().unwrap_or_default();
        match word {
            _ if first == b';' => {
                c.advance(1);
            }
            _ if first != b'.' => return Err(error(line, word, "this stands outside a function")),
            ".version" | ".target" | ".address_size" | ".file" | ".loc" => {
                let whole = c.line();
                let mut parts = whole.split_whitespace().skip(1);
                match word {
                    ".target" => source.target = parts.next().unwrap_or_default().trim_end_matches(',').to_string(),
                    ".file" => {
                        if let (Some(Ok(n)), Some(name)) = (parts.next().map(str::parse), whole.split('"').nth(1)) {
                            source.files.insert(n, name.to_string());
                        }
                    }
                    _ => {}
                }
            }
            ".section" => {
                c.until(|b| b == b'}').ok_or_else(ended)?;
                c.advance(1);
            }
            ".pragma" => {
                c.until(|b| b == b';').ok_or_else(ended)?;
            }
            _ => {
                let start = rest.split(';').next().unwrap_or_default();
                if start.contains(".entry") || start.contains(".func") {
                    let whole = c.until(|b| b == b';' || b == b'{').ok_or_else(ended)?;
                    if c.rest().starts_with('{') {
                        let (function, line) = (header(whole, line)?, c.line);
                        let text = c.braces().ok_or_else(|| error(line, "", "unbalanced braces"))?.to_string();
                        source.unread.push(Unread { function, text, line });
                    }
                } else if word == ".alias" {
                    return Err(error(line, start, "unsupported directive"));
                } else {
                    let whole = c.until(|b| b == b';').ok_or_else(ended)?;
                    match variable(whole, line) {
                        Ok(variable) => source.variables.push(variable),
                        Err(error) => source.unreadable.push(error),
                    }
                }
            }
        }
    }
    Ok(source)
}

/// Reads the body of a function, braces included, that starts at this line.
fn body(text: &str, line: u32) -> Result<Vec<Item>, LoadError> {
    let mut body = Vec::new();
    let mut c = Cursor { text, at: 0, line };
    loop {
        c.skip_space();
        let (rest, line) = (c.rest(), c.line);
        let Some(first) = rest.bytes().next() else { break };
        let ended = || error(line, rest.lines().next().unwrap_or_default(), "the text ends inside this");
        if let b'{' | b'}' | b';' = first {
            c.advance(1);
            match first {
                b'{' => body.push(Item::Open),
                b'}' => body.push(Item::Close),
                _ => {}
            }
            continue;
        }
        let word = rest.split(|ch: char| ch.is_whitespace()).next().unwrap_or_default();
        if first == b'.' {
            match word {
                ".loc" => body.push(Item::Loc(loc(c.line()))),
                ".section" => {
                    c.until(|b| b == b'}').ok_or_else(ended)?;
                    c.advance(1);
                }
                ".pragma" => {
                    c.until(|b| b == b';').ok_or_else(ended)?;
                }
                _ => {
                    let whole = c.until(|b| b == b';').ok_or_else(ended)?;
                    body.push(match word {
                        // `.reg.b32 f` in what is written by hand.
                        _ if word == ".reg" || word.starts_with(".reg.") => registers(whole, line)?,
                        ".shared" | ".local" | ".param" => Item::Variable(variable(whole, line)?),
                        ".branchtargets" => Item::Targets(
                            split_commas(whole.trim_start_matches(".branchtargets").trim())
                                .into_iter()
                                .map(str::to_string)
                                .collect(),
                        ),
                        _ => return Err(error(line, whole, "unsupported directive")),
                    });
                }
            }
            continue;
        }
        let name = rest.find(|ch: char| !(ch.is_ascii_alphanumeric() || "_$%".contains(ch))).unwrap_or(rest.len());
        let after = rest[name..].trim_start();
        if name > 0 && after.starts_with(':') && !after.starts_with("::") {
            body.push(Item::Label(rest[..name].to_string()));
            let colon = rest.find(':').unwrap_or(name);
            c.advance(colon + 1);
            continue;
        }
        let whole = c.until(|b| b == b';').ok_or_else(ended)?;
        body.push(Item::Instruction(statement(whole, line)?));
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_of_every_form() {
        assert_eq!(operand("%r1"), Some(Operand::Name("%r1".into())));
        assert_eq!(operand("0f3F800000"), Some(Operand::Float { bits: 0x3F80_0000, double: false }));
        assert_eq!(operand("-1"), Some(Operand::Integer(u64::MAX)));
        assert_eq!(
            operand("[%rd1+-16]"),
            Some(Operand::Address { base: Box::new(Operand::Name("%rd1".into())), offset: -16 })
        );
        assert_eq!(operand("{%r1, _}"), Some(Operand::List(vec![Operand::Name("%r1".into()), Operand::Sink])));
        assert_eq!(
            operand("[%rd1, {%r1, 2}]"),
            Some(Operand::Tensor {
                base: Box::new(Operand::Name("%rd1".into())),
                coordinates: vec![Operand::Name("%r1".into()), Operand::Integer(2)]
            })
        );
        assert_eq!(operand("[%rd1, %r1]"), None);
    }

    #[test]
    fn lines_are_kept_through_comments() {
        let text = "// a\n/* b\n c */\n.visible .entry k()\n{\n  add.s32 ?, 1;\n}\n";
        assert_eq!(outline(text).unwrap().read("k").unwrap_err().line, 6);
    }

    #[test]
    fn declarations() {
        let source = outline(".const .align 4 .b8 t[4] = {1, 2, 3};\n.extern .shared .align 16 .b8 s[];").unwrap();
        assert_eq!(source.variables[0].initial, [1, 2, 3, 0]);
        assert!(source.variables[1].external && source.variables[1].size == 0 && source.variables[1].align == 16);
    }
}
