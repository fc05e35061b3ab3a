//! From statements to operations: names become slots, opcodes and modifiers become functions. Whatever is not known
//! here is an error that names the line; nothing is ever guessed or skipped.

mod asynchronous;

use std::collections::HashMap;

use crate::{
    LoadError,
    arith::{self, Convert, Round, Type, low},
    matrix::Shape,
    parse::{Function, Item, Loc, Operand, Source, Space, Statement, Variable},
    program::*,
};

/// Shared addresses do not start at zero, as on the chip.
pub(crate) const SHARED_BASE: u64 = 0x400;
/// Generic addresses of shared, local and parameter memory.
pub(crate) const SHARED_WINDOW: u64 = 0x0100_0000_0000;
pub(crate) const LOCAL_WINDOW: u64 = 0x0200_0000_0000;
pub(crate) const PARAM_WINDOW: u64 = 0x0300_0000_0000;
pub(crate) const WINDOW: u64 = 0x0100_0000_0000;

fn align_up(value: u64, align: u64) -> u64 {
    value.div_ceil(align.max(1)) * align.max(1)
}

/// The modifiers of one instruction; each must be taken.
struct Modifiers<'a> {
    left: Vec<&'a str>,
}

impl<'a> Modifiers<'a> {
    fn take(&mut self, name: &str) -> bool {
        let found = self.left.iter().position(|m| *m == name);
        if let Some(i) = found {
            self.left.remove(i);
        }
        found.is_some()
    }

    fn take_any(&mut self, names: &[&'static str]) -> Option<&'static str> {
        names.iter().copied().find(|n| self.take(n))
    }

    fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.take(name);
        }
    }

    /// The first modifier that is a type.
    fn ty(&mut self) -> Option<Type> {
        let i = self.left.iter().position(|m| Type::parse(m).is_some())?;
        Type::parse(self.left.remove(i))
    }

    fn space(&mut self) -> Space {
        let found = self.take_any(&[
            "global",
            "shared::cta",
            "shared::cluster",
            "shared",
            "local",
            "param::entry",
            "param::func",
            "param",
            "const",
        ]);
        match found {
            Some("global") => Space::Global,
            Some("shared" | "shared::cta") => Space::Shared,
            Some("shared::cluster") => Space::Cluster,
            Some("local") => Space::Local,
            Some("const") => Space::Const,
            Some(_) => Space::Param,
            None => Space::Generic,
        }
    }

    /// Cache hints change no value.
    fn ignore_hints(&mut self) {
        self.ignore(&["nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt"]);
        self.left.retain(|m| !m.starts_with("L1::") && !m.starts_with("L2::"));
    }

    fn scope(&mut self) -> Option<&'static str> {
        self.take_any(&["cta", "cluster", "gpu", "sys"])
    }
}

#[derive(Clone, Copy, Debug)]
struct Register {
    slot: Slot,
    bits: u8,
}

#[derive(Clone, Debug)]
enum Symbol {
    Register(Register),
    Shared(u64),
    Local(u64),
    Param(u64),
}

struct Decoder<'a> {
    source: &'a Source,
    scopes: Vec<HashMap<String, Symbol>>,
    scope_ids: Vec<usize>,
    next_scope: usize,
    next_slot: usize,
    constants: Vec<(Slot, Constant)>,
    constant_slots: HashMap<Constant, Slot>,
    labels: HashMap<(usize, String), u32>,
    targets: HashMap<String, Vec<String>>,
    fixups: Vec<Fixup>,
    code: Vec<Instruction>,
    origins: Vec<Origin>,
    loc: Loc,
    shared: HashMap<String, u64>,
    static_shared: u64,
    dynamic_align: u64,
    local: u64,
    params: u64,
    register_names: Vec<(Slot, String)>,
    functions: HashMap<String, (u32, Vec<u64>, Vec<u64>)>,
    pending: Vec<String>,
    calls: Vec<(usize, String, Statement)>,
}

struct Fixup {
    at: usize,
    names: Vec<String>,
    scopes: Vec<usize>,
    line: u32,
    text: String,
}

fn fail<T>(s: &Statement, reason: impl Into<String>) -> Result<T, LoadError> {
    Err(LoadError { line: s.line, text: s.text.clone(), reason: reason.into() })
}

/// Decodes one kernel and the functions it calls.
pub(crate) fn kernel(source: &Source, function: &Function) -> Result<Kernel, LoadError> {
    let mut d = Decoder {
        source,
        scopes: vec![HashMap::new()],
        scope_ids: vec![0],
        next_scope: 1,
        next_slot: FIRST_FREE.into(),
        constants: vec![(TRUE, Constant::Value(1))],
        constant_slots: HashMap::new(),
        labels: HashMap::new(),
        targets: HashMap::new(),
        fixups: Vec::new(),
        code: Vec::new(),
        origins: Vec::new(),
        loc: Loc::default(),
        shared: HashMap::new(),
        static_shared: 0,
        dynamic_align: 16,
        local: 0,
        params: 0,
        register_names: Vec::new(),
        functions: HashMap::new(),
        pending: Vec::new(),
        calls: Vec::new(),
    };
    let mut parameters = Vec::new();
    for p in &function.params {
        let offset = align_up(d.params, p.align);
        d.params = offset + p.size;
        d.scopes[0].insert(p.name.clone(), Symbol::Param(offset));
        parameters.push(Parameter { offset: offset as usize, size: p.size as usize });
    }
    let parameter_bytes = d.params as usize;
    d.body(function)?;
    d.emit(Op::Exit, None, 0);
    while let Some(name) = d.pending.pop() {
        d.device_function(&name)?;
    }
    d.finish_calls()?;
    d.resolve()?;
    let dynamic_align = d.dynamic_align;
    let static_shared = d.static_shared;
    let mut kernel = Kernel {
        name: function.name.clone(),
        code: d.code,
        origins: d.origins,
        watched: Vec::new(),
        slots: d.next_slot,
        constants: d.constants,
        parameters,
        parameter_bytes,
        call_bytes: d.params as usize - parameter_bytes,
        static_shared: static_shared as u32,
        dynamic_align: dynamic_align as u32,
        local_bytes: d.local as usize,
        tracked: 0,
        max_threads: function.max_threads,
        min_blocks: function.min_blocks,
        max_registers: function.max_registers,
        cluster: function.cluster,
        register_names: d.register_names,
    };
    crate::defined::track(&mut kernel);
    crate::slots::share(&mut kernel);
    kernel.watched = crate::wgmma::watched(&kernel.code);
    Ok(kernel)
}

impl Decoder<'_> {
    fn body(&mut self, function: &Function) -> Result<(), LoadError> {
        let mut label = None;
        for item in &function.body {
            match item {
                Item::Open => {
                    self.scopes.push(HashMap::new());
                    self.scope_ids.push(self.next_scope);
                    self.next_scope += 1;
                }
                Item::Close => {
                    self.scopes.pop();
                    self.scope_ids.pop();
                }
                Item::Label(name) => {
                    let scope = *self.scope_ids.last().unwrap_or(&0);
                    self.labels.insert((scope, name.clone()), self.code.len() as u32);
                    label = Some(name.clone());
                }
                Item::Targets(names) => {
                    if let Some(label) = label.take() {
                        self.targets.insert(label, names.clone());
                    }
                }
                Item::Registers { ty, names } => self.registers(ty, names)?,
                Item::Variable(v) => self.variable(v),
                Item::Loc(loc) => self.loc = *loc,
                Item::Instruction(s) => self.instruction(s)?,
            }
        }
        Ok(())
    }

    fn device_function(&mut self, name: &str) -> Result<(), LoadError> {
        let missing = || LoadError { line: 0, text: name.into(), reason: "a call of an undefined function".into() };
        let function = self.source.functions.iter().find(|f| f.name == name && !f.entry).ok_or_else(missing)?;
        self.scopes.truncate(1);
        self.scopes[0] = HashMap::new();
        self.scope_ids = vec![self.next_scope];
        self.next_scope += 1;
        let mut place = |v: &Variable| {
            let offset = align_up(self.params, v.align);
            self.params = offset + v.size;
            self.scopes[0].insert(v.name.clone(), Symbol::Param(offset));
            offset
        };
        let returns: Vec<u64> = function.returns.iter().map(&mut place).collect();
        let params: Vec<u64> = function.params.iter().map(&mut place).collect();
        self.functions.insert(name.to_string(), (self.code.len() as u32, params, returns));
        self.body(function)?;
        self.emit(Op::Return, None, 0);
        Ok(())
    }

    fn registers(&mut self, ty: &str, names: &[String]) -> Result<(), LoadError> {
        let line = 0;
        let Some(ty) = Type::parse(ty).filter(|t| *t != Type::B128) else {
            return Err(LoadError { line, text: format!(".reg .{ty}"), reason: "unknown register type".into() });
        };
        for name in names {
            let slot = self.new_slot()?;
            self.register_names.push((slot, name.clone()));
            let register = Register { slot, bits: ty.bits() as u8 };
            if let Some(scope) = self.scopes.last_mut() {
                scope.insert(name.clone(), Symbol::Register(register));
            }
        }
        Ok(())
    }

    fn new_slot(&mut self) -> Result<Slot, LoadError> {
        let slot = Slot::try_from(self.next_slot).map_err(|_| LoadError {
            line: 0,
            text: String::new(),
            reason: "more than 65535 registers and constants".into(),
        })?;
        self.next_slot += 1;
        Ok(slot)
    }

    fn variable(&mut self, v: &Variable) {
        let symbol = match v.space {
            Space::Shared => Symbol::Shared(self.place_shared(v)),
            Space::Local => {
                let at = align_up(self.local, v.align.max(16));
                self.local = at + v.size;
                Symbol::Local(at)
            }
            _ => {
                let at = align_up(self.params, v.align.max(16));
                self.params = at + v.size;
                Symbol::Param(at)
            }
        };
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(v.name.clone(), symbol);
        }
    }

    fn place_shared(&mut self, v: &Variable) -> u64 {
        if let Some(&at) = self.shared.get(&v.name) {
            return at;
        }
        let at = align_up(self.static_shared, v.align);
        self.static_shared = at + v.size;
        self.shared.insert(v.name.clone(), at);
        at
    }

    fn constant(&mut self, value: Constant) -> Result<Slot, LoadError> {
        if let Some(&slot) = self.constant_slots.get(&value) {
            return Ok(slot);
        }
        let slot = self.new_slot()?;
        self.constants.push((slot, value));
        self.constant_slots.insert(value, slot);
        Ok(slot)
    }

    fn emit(&mut self, op: Op, guard: Option<(Slot, bool)>, line: u32) {
        let (guard, negated) = guard.unwrap_or((TRUE, false));
        self.code.push(Instruction { op, guard, negated });
        self.origins.push(Origin { loc: self.loc, line });
    }

    fn lookup(&self, name: &str) -> Option<&Symbol> {
        self.scopes.iter().rev().find_map(|s| s.get(name))
    }

    fn register(&self, s: &Statement, o: &Operand) -> Result<Register, LoadError> {
        match o {
            Operand::Sink => return Ok(Register { slot: SINK, bits: 64 }),
            Operand::Name(name) => {
                if let Some(Symbol::Register(r)) = self.lookup(name) {
                    return Ok(*r);
                }
            }
            _ => {}
        }
        fail(s, format!("expected a register, found {o:?}"))
    }

    /// The slot that is written.
    fn d(&self, s: &Statement, i: usize) -> Result<Slot, LoadError> {
        Ok(self.register(s, self.operand(s, i)?)?.slot)
    }

    fn operand<'s>(&self, s: &'s Statement, i: usize) -> Result<&'s Operand, LoadError> {
        s.operands.get(i).map_or_else(|| fail(s, "too few operands"), Ok)
    }

    /// The slot of operand `i`, read as a value of type `ty`.
    fn a(&mut self, s: &Statement, i: usize, ty: Type) -> Result<Slot, LoadError> {
        let o = self.operand(s, i)?.clone();
        self.value(s, &o, ty)
    }

    fn value(&mut self, s: &Statement, o: &Operand, ty: Type) -> Result<Slot, LoadError> {
        let constant = match o {
            Operand::Integer(_) if matches!(ty, Type::F32 | Type::F64 | Type::Tf32) => {
                return fail(s, "an integer where a float is expected");
            }
            Operand::Integer(v) => Constant::Value(low(*v, ty.bits())),
            Operand::Float { bits, double } => Constant::Value(match (ty, double) {
                (Type::F64 | Type::B64, true) | (Type::F32 | Type::B32, false) => *bits,
                (Type::F32, true) => (f64::from_bits(*bits) as f32).to_bits().into(),
                _ => return fail(s, "a floating-point literal of another type"),
            }),
            Operand::Name(name) => match self.lookup(name) {
                Some(Symbol::Register(r)) => return Ok(r.slot),
                Some(symbol) => Constant::Value(match symbol.clone() {
                    Symbol::Shared(at) => SHARED_BASE + at,
                    Symbol::Local(at) | Symbol::Param(at) => at,
                    Symbol::Register(_) => 0,
                }),
                None if name == "WARP_SZ" => Constant::Value(32),
                None => {
                    if let Some(i) = SPECIAL.iter().position(|n| n == name) {
                        return Ok(i as Slot);
                    }
                    match self.source.variables.iter().position(|v| v.name == *name) {
                        Some(i) => {
                            let v = &self.source.variables[i];
                            match v.space {
                                Space::Shared if v.external && v.size == 0 => {
                                    self.dynamic_align = self.dynamic_align.max(v.align);
                                    Constant::DynamicShared
                                }
                                Space::Shared => Constant::Value(SHARED_BASE + self.place_shared(&v.clone())),
                                _ => Constant::Global(i as u32),
                            }
                        }
                        None => {
                            let why = self.source.unreadable.iter().find(|e| e.text.contains(name.as_str()));
                            return why.cloned().map_or_else(|| fail(s, format!("unknown name `{name}`")), Err);
                        }
                    }
                }
            },
            Operand::Sink => return Ok(SINK),
            _ => return fail(s, format!("unexpected operand {o:?}")),
        };
        self.constant(constant)
    }

    /// A predicate source, perhaps negated: the slot and whether to negate.
    fn predicate(&mut self, s: &Statement, i: usize) -> Result<(Slot, bool), LoadError> {
        match self.operand(s, i)? {
            Operand::Not(name) => Ok((self.register(s, &Operand::Name(name.clone()))?.slot, true)),
            Operand::Integer(v) => Ok((self.constant(Constant::Value(u64::from(*v != 0)))?, false)),
            o => Ok((self.register(s, &o.clone())?.slot, false)),
        }
    }

    fn address(&mut self, s: &Statement, i: usize) -> Result<(Slot, i32), LoadError> {
        let Operand::Address { base, offset } = self.operand(s, i)?.clone() else {
            return fail(s, "expected an address");
        };
        let Ok(offset) = i32::try_from(offset) else { return fail(s, "an offset above 31 bits") };
        Ok((self.value(s, &base, Type::B64)?, offset))
    }

    /// 1 to 4 slots: a register or a vector.
    fn vector(&mut self, s: &Statement, i: usize, ty: Type) -> Result<Vec<Slot>, LoadError> {
        match self.operand(s, i)?.clone() {
            Operand::List(list) => list.iter().map(|o| self.value(s, o, ty)).collect(),
            o => Ok(vec![self.value(s, &o, ty)?]),
        }
    }

    fn instruction(&mut self, s: &Statement) -> Result<(), LoadError> {
        let guard = match &s.guard {
            Some((name, negated)) => Some((self.register(s, &Operand::Name(name.clone()))?.slot, *negated)),
            None => None,
        };
        let mut m = Modifiers { left: s.modifiers.iter().map(String::as_str).collect() };
        let op = self.operation(s, &mut m)?;
        if !m.left.is_empty() {
            return fail(s, format!("unsupported modifier `.{}` of `{}`", m.left.join("."), s.opcode));
        }
        self.emit(op, guard, s.line);
        Ok(())
    }

    fn need<T>(&self, s: &Statement, found: Option<T>) -> Result<T, LoadError> {
        found.map_or_else(|| fail(s, format!("unsupported form of `{}`", s.opcode)), Ok)
    }

    fn ty(&self, s: &Statement, m: &mut Modifiers) -> Result<Type, LoadError> {
        self.need(s, m.ty())
    }

    fn operation(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        match s.opcode.as_str() {
            "add" | "sub" | "mul" | "mul24" | "div" | "rem" | "min" | "max" | "copysign" => self.two(s, m),
            "addc" | "subc" => self.carry(s, m, true),
            "and" | "or" | "xor" => {
                let ty = self.ty(s, m)?;
                let f = self.need(s, arith::logic(&s.opcode))?;
                Ok(Op::Binary { f, d: self.d(s, 0)?, a: self.a(s, 1, ty)?, b: self.a(s, 2, ty)? })
            }
            "shl" | "shr" => {
                let ty = self.ty(s, m)?;
                let f = self.need(s, arith::shift(&s.opcode, ty))?;
                Ok(Op::Binary { f, d: self.d(s, 0)?, a: self.a(s, 1, ty)?, b: self.a(s, 2, Type::U32)? })
            }
            "not" | "neg" | "abs" | "popc" | "clz" | "brev" | "bfind" | "ex2" | "lg2" | "rcp" | "sqrt" | "rsqrt"
            | "sin" | "cos" | "tanh" => self.one(s, m),
            "mad" | "fma" | "sad" | "bfe" | "prmt" | "shf" | "selp" | "slct" => self.three(s, m),
            "bfi" => {
                let ty = self.ty(s, m)?;
                let bits64 = ty == Type::B64;
                let (a, b) = (self.a(s, 1, ty)?, self.a(s, 2, ty)?);
                let (c, e) = (self.a(s, 3, Type::U32)?, self.a(s, 4, Type::U32)?);
                Ok(Op::BitInsert { d: self.d(s, 0)?, a, b, c, e, bits64 })
            }
            "lop3" => {
                let ty = self.ty(s, m)?;
                let Operand::Integer(table) = *self.operand(s, 4)? else { return fail(s, "lop3 without a table") };
                let (a, b, c) = (self.a(s, 1, ty)?, self.a(s, 2, ty)?, self.a(s, 3, ty)?);
                Ok(Op::Lop3 { d: self.d(s, 0)?, a, b, c, table: table as u8, bits64: ty == Type::B64 })
            }
            "setp" | "set" => self.compare(s, m),
            "mov" => self.moves(s, m),
            "cvt" => self.convert(s, m),
            "cvta" => self.convert_address(s, m),
            "isspacep" => {
                let space = m.space();
                let window = match space {
                    Space::Shared | Space::Cluster => SHARED_WINDOW,
                    Space::Local => LOCAL_WINDOW,
                    _ => return fail(s, "unsupported space of isspacep"),
                };
                let b = self.constant(Constant::Value(window))?;
                let f: arith::Binary = |a, w| u64::from(a >= w && a < w + WINDOW);
                Ok(Op::Binary { f, d: self.d(s, 0)?, a: self.a(s, 1, Type::B64)?, b })
            }
            "mbarrier" | "wgmma" | "setmaxnreg" | "elect" | "mapa" | "getctarank" => self.asynchronous(s, m),
            "cp" if s.modifiers.iter().any(|w| w == "bulk") => self.asynchronous(s, m),
            "fence" if s.modifiers.iter().any(|w| w == "mbarrier_init" || w == "async") => self.asynchronous(s, m),
            "barrier" if s.modifiers.iter().any(|w| w == "cluster") => self.asynchronous(s, m),
            "ld" | "ldu" => self.load(s, m),
            "st" => self.store(s, m),
            "atom" | "red" => self.atomic(s, m),
            "cp" => self.copy_async(s, m),
            "bar" | "barrier" => self.barrier(s, m),
            "membar" => {
                let scope = self.need(s, m.take_any(&["cta", "gl", "sys"]))?;
                Ok(Op::Fence { block_only: scope == "cta" })
            }
            "fence" => {
                if m.take("proxy") {
                    m.ignore(&["alias"]);
                    return if m.left.is_empty() { Ok(Op::Nothing) } else { fail(s, "unsupported proxy fence") };
                }
                m.ignore(&["sc", "acq_rel"]);
                let scope = self.need(s, m.scope())?;
                Ok(Op::Fence { block_only: scope == "cta" })
            }
            "griddepcontrol" => {
                self.need(s, m.take_any(&["launch_dependents", "wait"]))?;
                Ok(Op::Nothing)
            }
            "prefetch" | "prefetchu" | "discard" | "applypriority" => {
                m.left.clear();
                Ok(Op::Nothing)
            }
            "nanosleep" => {
                m.left.clear();
                Ok(Op::Nothing)
            }
            "shfl" | "vote" | "redux" | "match" | "ldmatrix" | "mma" | "activemask" => self.collective(s, m),
            "bra" => {
                m.ignore(&["uni"]);
                let Operand::Name(label) = self.operand(s, 0)?.clone() else { return fail(s, "expected a label") };
                self.fixup(s, vec![label]);
                Ok(Op::Branch { target: u32::MAX })
            }
            "brx" => {
                m.ignore(&["idx", "uni"]);
                let Operand::Name(list) = self.operand(s, 1)?.clone() else { return fail(s, "expected a list") };
                let names = self.need(s, self.targets.get(&list).cloned())?;
                self.fixup(s, names);
                Ok(Op::BranchIndexed { index: self.a(s, 0, Type::U32)?, targets: Box::new([]) })
            }
            "call" => self.call(s, m),
            "ret" => {
                m.ignore(&["uni"]);
                Ok(Op::Return)
            }
            "exit" => Ok(Op::Exit),
            "trap" => Ok(Op::Trap),
            "brkpt" => Ok(Op::Nothing),
            _ => fail(s, format!("unknown opcode `{}`", s.opcode)),
        }
    }

    fn fixup(&mut self, s: &Statement, names: Vec<String>) {
        let scopes = self.scope_ids.clone();
        self.fixups.push(Fixup { at: self.code.len(), names, scopes, line: s.line, text: s.text.clone() });
    }

    fn resolve(&mut self) -> Result<(), LoadError> {
        for fixup in std::mem::take(&mut self.fixups) {
            let find = |name: &String| {
                let found = fixup.scopes.iter().rev().find_map(|&s| self.labels.get(&(s, name.clone())));
                found.copied().ok_or_else(|| LoadError {
                    line: fixup.line,
                    text: fixup.text.clone(),
                    reason: format!("no label `{name}`"),
                })
            };
            let found: Vec<u32> = fixup.names.iter().map(find).collect::<Result<_, _>>()?;
            match &mut self.code[fixup.at].op {
                Op::Branch { target } => *target = found[0],
                Op::BranchIndexed { targets, .. } => *targets = found.into(),
                _ => {}
            }
        }
        Ok(())
    }

    fn two(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        if s.modifiers.iter().any(|w| w == "cc") {
            return self.carry(s, m, false);
        }
        let ty = self.ty(s, m)?;
        if let (Type::F32, Some(round)) = (ty, m.take_any(&["rz", "rm", "rp"])) {
            let f = self.need(s, arith::directed_f32(&s.opcode, direction(round)))?;
            return Ok(Op::Ternary { f, d: self.d(s, 0)?, a: self.a(s, 1, ty)?, b: self.a(s, 2, ty)?, c: SINK });
        }
        let f = if ty.float() {
            let mut name = s.opcode.clone();
            match name.as_str() {
                "min" | "max" => {
                    if m.take("NaN") {
                        name.push_str(".nan");
                    }
                }
                "div" => {
                    self.need(s, m.take_any(&["rn", "approx", "full"]))?;
                }
                _ => m.ignore(&["rn"]),
            }
            let (ftz, sat) = (m.take("ftz"), m.take("sat"));
            arith::float_binary(&name, ty, ftz, sat)
        } else {
            let mut name = s.opcode.clone();
            if let Some(part) = m.take_any(&["lo", "hi", "wide", "sat"]) {
                name = format!("{name}.{part}");
            }
            arith::integer_binary(&name, ty)
        };
        let f = self.need(s, f)?;
        Ok(Op::Binary { f, d: self.d(s, 0)?, a: self.a(s, 1, ty)?, b: self.a(s, 2, ty)? })
    }

    fn carry(&mut self, s: &Statement, m: &mut Modifiers, take: bool) -> Result<Op, LoadError> {
        let ty = self.ty(s, m)?;
        if !matches!(ty.bits(), 32 | 64) || ty.float() || s.opcode.starts_with('m') {
            return fail(s, "unsupported form of carry arithmetic");
        }
        let give = m.take("cc");
        // One carry flag per thread, in a slot of its own.
        if !self.scopes[0].contains_key("%carry") {
            let slot = self.new_slot()?;
            self.register_names.push((slot, "the carry flag".into()));
            self.scopes[0].insert("%carry".into(), Symbol::Register(Register { slot, bits: 1 }));
        }
        let carry = self.register(s, &Operand::Name("%carry".into()))?.slot;
        let (a, b) = (self.a(s, 1, ty)?, self.a(s, 2, ty)?);
        let (bits64, subtract) = (ty.bits() == 64, s.opcode.starts_with("sub"));
        Ok(Op::AddCarry { d: self.d(s, 0)?, a, b, carry, bits64, subtract, take, give })
    }

    fn one(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        let ty = self.ty(s, m)?;
        let f = if ty.float() {
            let mut ftz = m.take("ftz");
            let approx = m.take_any(&["approx", "rn"]);
            let mut name = s.opcode.clone();
            match s.opcode.as_str() {
                "neg" | "abs" if approx.is_none() => {}
                "rcp" if ty == Type::F64 && ftz => {
                    ftz = false;
                    name = "rcp.ftz".into();
                }
                "rcp" | "sqrt" if approx.is_some() => {}
                "ex2" | "lg2" | "rsqrt" | "sin" | "cos" | "tanh" if approx == Some("approx") => {}
                _ => return fail(s, "unsupported rounding"),
            }
            arith::float_unary(&name, ty, ftz)
        } else {
            arith::integer_unary(&s.opcode, ty)
        };
        let f = self.need(s, f)?;
        Ok(Op::Unary { f, d: self.d(s, 0)?, a: self.a(s, 1, ty)? })
    }

    fn three(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        let ty = self.ty(s, m)?;
        let (mut last, mut name) = (ty, s.opcode.clone());
        let f = match s.opcode.as_str() {
            "fma" | "mad" if ty.float() => match self.need(s, m.take_any(&["rn", "rz", "rm", "rp"]))? {
                "rn" => {
                    let (ftz, sat, relu) = (m.take("ftz"), m.take("sat"), m.take("relu"));
                    arith::fma(ty, ftz, sat, relu)
                }
                round if ty == Type::F32 => arith::directed_f32("fma", direction(round)),
                _ => None,
            },
            "mad" => {
                let part = self.need(s, m.take_any(&["lo", "hi", "wide"]))?;
                name = format!("mad.{part}");
                if part == "wide" {
                    last = if ty.bits() == 32 { Type::B64 } else { Type::B32 };
                }
                arith::integer_ternary(&name, ty)
            }
            "shf" => {
                let side = self.need(s, m.take_any(&["l", "r"]))?;
                let mode = self.need(s, m.take_any(&["wrap", "clamp"]))?;
                arith::integer_ternary(&format!("shf.{side}.{mode}"), ty)
            }
            "selp" => {
                let (a, b) = (self.a(s, 1, ty)?, self.a(s, 2, ty)?);
                let (p, negated) = self.predicate(s, 3)?;
                let (a, b) = if negated { (b, a) } else { (a, b) };
                let f = self.need(s, arith::integer_ternary("selp", ty))?;
                return Ok(Op::Ternary { f, d: self.d(s, 0)?, a, b, c: p });
            }
            "slct" => {
                if m.ty() != Some(Type::S32) {
                    return fail(s, "unsupported form of slct");
                }
                last = Type::S32;
                arith::integer_ternary("slct.s32", ty)
            }
            _ => arith::integer_ternary(&name, ty),
        };
        let second = if s.opcode == "bfe" { Type::U32 } else { ty };
        if s.opcode == "bfe" {
            last = Type::U32;
        }
        let f = self.need(s, f)?;
        let (a, b, c) = (self.a(s, 1, ty)?, self.a(s, 2, second)?, self.a(s, 3, last)?);
        Ok(Op::Ternary { f, d: self.d(s, 0)?, a, b, c })
    }

    fn compare(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        const TESTS: [&str; 18] = [
            "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu",
            "num", "nan",
        ];
        let test = self.need(s, m.take_any(&TESTS))?;
        let combine = m.take_any(&["and", "or", "xor"]);
        let ftz = m.take("ftz");
        let result = if s.opcode == "set" { Some(self.ty(s, m)?) } else { None };
        let ty = self.ty(s, m)?;
        let f = self.need(s, arith::compare(test, ty, ftz))?;
        let (a, b) = (self.a(s, 1, ty)?, self.a(s, 2, ty)?);
        if let Some(result) = result {
            // `set`: all ones or 1.0 where the comparison holds.
            if combine.is_some() {
                return fail(s, "unsupported form of set");
            }
            let yes = match result {
                Type::U32 | Type::S32 => 0xFFFF_FFFF,
                Type::F32 => 0x3F80_0000,
                Type::F16 => 0x3C00,
                Type::Bf16 => 0x3F80,
                _ => return fail(s, "unsupported result of set"),
            };
            let p = self.new_slot()?;
            self.emit(Op::Compare { f, d: p, a, b }, None, s.line);
            let (a, b) = (self.constant(Constant::Value(yes))?, self.constant(Constant::Value(0))?);
            let f = self.need(s, arith::integer_ternary("selp", result))?;
            return Ok(Op::Ternary { f, d: self.d(s, 0)?, a, b, c: p });
        }
        let (d, q) = match self.operand(s, 0)?.clone() {
            Operand::Pair(d, q) => (self.register(s, &d)?.slot, Some(self.register(s, &q)?.slot)),
            o => (self.register(s, &o)?.slot, None),
        };
        if combine.is_none() && q.is_none() {
            return Ok(Op::Compare { f, d, a, b });
        }
        let (mut c, mut combined) = (TRUE, arith::logic("and"));
        if let Some(name) = combine {
            let (slot, negated) = self.predicate(s, 3)?;
            c = slot;
            combined = if negated {
                match name {
                    "and" => Some(|x, y| x & (y ^ 1)),
                    "or" => Some(|x, y| x | (y ^ 1)),
                    _ => Some(|x, y| x ^ y ^ 1),
                }
            } else {
                arith::logic(name)
            };
        }
        let combine = self.need(s, combined)?;
        Ok(Op::CompareWith { f, combine, d, q: q.unwrap_or(SINK), a, b, c })
    }

    fn moves(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        let ty = self.ty(s, m)?;
        let pad = |v: Vec<Slot>| {
            let mut out = [SINK; 4];
            out[..v.len()].copy_from_slice(&v);
            out
        };
        let part = |n: usize| match (ty.bits(), n) {
            (32, 2) => Some(Type::B16),
            (64, 2) => Some(Type::B32),
            (64, 4) => Some(Type::B16),
            (16, 2) | (32, 4) => Some(Type::B8),
            _ => None,
        };
        if let Operand::List(list) = self.operand(s, 0)?.clone() {
            let part = self.need(s, part(list.len()))?;
            let d = list.iter().map(|o| self.register(s, o).map(|r| r.slot)).collect::<Result<Vec<_>, _>>()?;
            let a = self.a(s, 1, ty)?;
            return Ok(Op::Unpack { a, bits: part.bits() as u8, count: d.len() as u8, d: pad(d) });
        }
        if let Operand::List(list) = self.operand(s, 1)?.clone() {
            let part = self.need(s, part(list.len()))?;
            let a = self.vector(s, 1, part)?;
            return Ok(Op::Pack { d: self.d(s, 0)?, bits: part.bits() as u8, count: a.len() as u8, a: pad(a) });
        }
        let d = self.d(s, 0)?;
        if let Operand::Name(name) = self.operand(s, 1)? {
            match name.as_str() {
                "%clock" | "%clock_hi" | "%globaltimer_lo" => return Ok(Op::Clock { d, mask: 0xFFFF_FFFF }),
                "%clock64" | "%globaltimer" => return Ok(Op::Clock { d, mask: u64::MAX }),
                _ => {}
            }
            // The generic address of a parameter is not its offset; nvcc always follows with cvta.param.
        }
        if let (Type::Pred, Operand::Not(_)) = (ty, self.operand(s, 1)?) {
            let (a, _) = self.predicate(s, 1)?;
            return Ok(Op::Unary { f: |x| x ^ 1, d, a });
        }
        Ok(Op::Move { d, a: self.a(s, 1, ty)? })
    }

    fn convert(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        let rounding = m.take_any(&["rni", "rzi", "rmi", "rpi", "rn", "rz", "rm", "rp", "rna"]);
        let (ftz, sat, relu) = (m.take("ftz"), m.take("sat"), m.take("relu"));
        let to = self.ty(s, m)?;
        let from = self.ty(s, m)?;
        let destination = self.register(s, self.operand(s, 0)?)?;
        let d = destination.slot;
        let round = match rounding {
            None | Some("rn" | "rni") => Round::Nearest,
            Some("rna") => Round::NearestAway,
            Some("rz" | "rzi") => Round::Zero,
            Some("rm" | "rmi") => Round::Down,
            _ => Round::Up,
        };
        let whole = matches!(rounding, Some("rni" | "rzi" | "rmi" | "rpi"));
        if matches!(to, Type::Bf16x2 | Type::F16x2) {
            // d = {a, b}: a in the high half.
            if from != Type::F32 || sat || ftz {
                return fail(s, "unsupported form of cvt");
            }
            let half = if to == Type::Bf16x2 { Type::Bf16 } else { Type::F16 };
            let how = Convert { from, to: half, round, integral: false, ftz, sat, relu, register: 16 };
            let (a, b) = (self.a(s, 1, from)?, self.a(s, 2, from)?);
            let (high, low) = (self.new_slot()?, self.new_slot()?);
            if s.guard.is_some() {
                return fail(s, "a guarded cvt of a pair");
            }
            self.emit(Op::Convert { d: high, a, how }, None, s.line);
            self.emit(Op::Convert { d: low, a: b, how }, None, s.line);
            return Ok(Op::Pack { d, bits: 16, count: 2, a: [low, high, SINK, SINK] });
        }
        if matches!(from, Type::Bf16x2 | Type::F16x2) {
            return fail(s, "unsupported form of cvt");
        }
        let a = self.a(s, 1, from)?;
        if to.float() || from.float() {
            let missing = match (from.float(), to.float()) {
                (true, true) => rounding.is_none() && to.bits() < from.bits(),
                _ => rounding.is_none(),
            };
            let integral_to_float = to.float() && !from.float() && whole;
            if missing || integral_to_float || (relu && !to.float()) || (sat && !to.float()) {
                return fail(s, "cvt without its rounding, or with another's");
            }
            let register = destination.bits.max(to.bits() as u8);
            let integral = whole && to.float();
            return Ok(Op::Convert { d, a, how: Convert { from, to, round, integral, ftz, sat, relu, register } });
        }
        if rounding.is_some() || ftz || relu || sat {
            return fail(s, "unsupported form of cvt");
        }
        // Cut or extend to the smaller type, then extend to the register by the destination's sign.
        macro_rules! chain {
            ($($from:ident $to:ident $register:literal => $f:expr),* $(,)?) => {
                match (from.bits(), from.signed(), to.bits(), to.signed(), destination.bits) {
                    $(_ if from == Type::$from && to == Type::$to && destination.bits == $register => Some($f as arith::Unary),)*
                    _ => None,
                }
            };
        }
        let special = chain!(
            S32 S64 64 => |x| x as i32 as u64,
            U32 U64 64 => |x| x,
            U64 U32 32 => |x| low(x, 32),
            S64 S32 32 => |x| low(x, 32),
        );
        let f = match special {
            Some(f) => f,
            None => {
                let bits = from.bits().min(to.bits());
                // The narrower of the two keeps its low bits; the extension follows the source when it widens,
                // the destination when the register is wider than the destination type.
                let widening = to.bits() > from.bits();
                let by_source = widening && from.signed();
                let by_destination = !widening && to.signed();
                let (signed, out) = if widening {
                    let out = if to.signed() || !by_source { destination.bits.into() } else { to.bits() };
                    (by_source, out)
                } else {
                    (by_destination, u32::from(destination.bits))
                };
                let f: Option<arith::Unary> = match (bits, signed, out) {
                    (8, false, _) => Some(|x| low(x, 8)),
                    (16, false, _) => Some(|x| low(x, 16)),
                    (32, false, _) => Some(|x| low(x, 32)),
                    (64, _, _) => Some(|x| x),
                    (8, true, 16) => Some(|x| low(sign_extend8(x), 16)),
                    (8, true, 32) => Some(|x| low(sign_extend8(x), 32)),
                    (8, true, 64) => Some(sign_extend8),
                    (16, true, 16) => Some(|x| low(x, 16)),
                    (16, true, 32) => Some(|x| low(x as u16 as i16 as u64, 32)),
                    (16, true, 64) => Some(|x| x as u16 as i16 as u64),
                    (32, true, 32) => Some(|x| low(x, 32)),
                    (32, true, 64) => Some(|x| x as i32 as u64),
                    _ => None,
                };
                self.need(s, f)?
            }
        };
        Ok(Op::Unary { f, d, a })
    }

    fn convert_address(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        let to = m.take("to");
        let space = m.space();
        let ty = self.ty(s, m)?;
        if ty.bits() != 64 && !(ty.bits() == 32 && space == Space::Shared && to) {
            return fail(s, "cvta of 32 bits");
        }
        let (d, a) = (self.d(s, 0)?, self.a(s, 1, ty)?);
        let window = match space {
            Space::Global | Space::Const => return Ok(Op::Move { d, a }),
            Space::Shared | Space::Cluster => SHARED_WINDOW,
            Space::Local => LOCAL_WINDOW,
            Space::Param => PARAM_WINDOW,
            Space::Generic => return fail(s, "cvta without a space"),
        };
        let b = self.constant(Constant::Value(window))?;
        let f: arith::Binary = if to { |x, w| x.wrapping_sub(w) } else { |x, w| x.wrapping_add(w) };
        Ok(Op::Binary { f, d, a, b })
    }

    /// What `ld` and `st` have in common.
    fn access(&mut self, s: &Statement, m: &mut Modifiers, load: bool) -> Result<(Access, Type), LoadError> {
        m.ignore(&["weak"]);
        let order = m.take_any(&["volatile", "relaxed", "acquire", "release", "mmio"]);
        if order.is_some() {
            m.scope();
        }
        let space = m.space();
        m.ignore_hints();
        let count = match m.take_any(&["v2", "v4"]) {
            Some("v2") => 2,
            Some(_) => 4,
            None => 1,
        };
        m.ignore(&["unified"]);
        let ty = self.ty(s, m)?;
        if ty == Type::B128 || ty == Type::Pred {
            return fail(s, "unsupported type of an access");
        }
        let (base, offset) = self.address(s, usize::from(load))?;
        let regs = if load {
            match self.operand(s, 0)?.clone() {
                Operand::List(list) => list.iter().map(|o| self.register(s, o)).collect::<Result<Vec<_>, _>>()?,
                o => vec![self.register(s, &o)?],
            }
        } else {
            self.vector(s, 1, ty)?.into_iter().map(|slot| Register { slot, bits: 64 }).collect()
        };
        if regs.len() != usize::from(count) {
            return fail(s, "the vector has another length");
        }
        let extend = if load && ty.signed() { regs[0].bits } else { 0 };
        let mut slots = [SINK; 4];
        for (slot, r) in slots.iter_mut().zip(&regs) {
            *slot = r.slot;
        }
        let access = Access {
            space,
            bytes: (ty.bits() / 8) as u8,
            count,
            extend,
            strong: order.is_some(),
            acquire: order == Some("acquire"),
            release: order == Some("release"),
            base,
            offset,
            regs: slots,
        };
        Ok((access, ty))
    }

    fn load(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        Ok(Op::Load(self.access(s, m, true)?.0))
    }

    fn store(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        Ok(Op::Store(self.access(s, m, false)?.0))
    }

    fn atomic(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        let order = m.take_any(&["relaxed", "acquire", "release", "acq_rel"]);
        m.scope();
        let space = m.space();
        m.ignore_hints();
        m.ignore(&["noftz"]);
        let name = self.need(s, m.take_any(&["add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"]))?;
        let ty = self.ty(s, m)?;
        let f: Option<arith::Ternary> = match (name, ty) {
            ("add", Type::U32 | Type::S32) => Some(|o, b, _| low(o.wrapping_add(b), 32)),
            ("add", Type::U64) => Some(|o, b, _| o.wrapping_add(b)),
            ("add", Type::F32) => {
                Some(|o, b, _| (f32::from_bits(o as u32) + f32::from_bits(b as u32)).to_bits().into())
            }
            ("add", Type::F64) => Some(|o, b, _| (f64::from_bits(o) + f64::from_bits(b)).to_bits()),
            ("min", Type::U32 | Type::U64) => Some(|o, b, _| o.min(b)),
            ("max", Type::U32 | Type::U64) => Some(|o, b, _| o.max(b)),
            ("min", Type::S32) => Some(|o, b, _| (o as i32).min(b as i32) as u32 as u64),
            ("max", Type::S32) => Some(|o, b, _| (o as i32).max(b as i32) as u32 as u64),
            ("min", Type::S64) => Some(|o, b, _| (o as i64).min(b as i64) as u64),
            ("max", Type::S64) => Some(|o, b, _| (o as i64).max(b as i64) as u64),
            ("and", Type::B32 | Type::B64) => Some(|o, b, _| o & b),
            ("or", Type::B32 | Type::B64) => Some(|o, b, _| o | b),
            ("xor", Type::B32 | Type::B64) => Some(|o, b, _| o ^ b),
            ("exch", Type::B32 | Type::B64) => Some(|_, b, _| b),
            ("cas", Type::B16 | Type::B32 | Type::B64) => Some(|o, b, c| if o == b { c } else { o }),
            ("inc", Type::U32) => Some(|o, b, _| if o >= b { 0 } else { o + 1 }),
            ("dec", Type::U32) => Some(|o, b, _| if o == 0 || o > b { b } else { o - 1 }),
            _ => None,
        };
        let f = self.need(s, f)?;
        let first = usize::from(s.opcode == "atom");
        let d = if first == 1 { self.d(s, 0)? } else { SINK };
        let (base, offset) = self.address(s, first)?;
        let b = self.a(s, first + 1, ty)?;
        let c = if name == "cas" { self.a(s, first + 2, ty)? } else { SINK };
        let acquire = matches!(order, Some("acquire" | "acq_rel"));
        let release = matches!(order, Some("release" | "acq_rel"));
        Ok(Op::Atomic(Box::new(Atomic {
            space,
            bytes: (ty.bits() / 8) as u8,
            acquire,
            release,
            d,
            base,
            offset,
            b,
            c,
            f,
        })))
    }

    fn copy_async(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        if !m.take("async") {
            return fail(s, "unsupported form of cp");
        }
        if m.take("commit_group") {
            return Ok(Op::CommitGroup);
        }
        if m.take("wait_all") {
            return Ok(Op::WaitAll);
        }
        if m.take("wait_group") {
            let Operand::Integer(n) = *self.operand(s, 0)? else { return fail(s, "expected a number") };
            return Ok(Op::WaitGroup { pending: n as u32 });
        }
        let cache = self.need(s, m.take_any(&["ca", "cg"]))?;
        self.need(s, m.take_any(&["shared::cta", "shared"]))?;
        self.need(s, m.take_any(&["global"]))?;
        m.ignore_hints();
        let Operand::Integer(bytes) = *self.operand(s, 2)? else { return fail(s, "expected a number") };
        if !matches!((cache, bytes), ("cg", 16) | ("ca", 4 | 8 | 16)) {
            return fail(s, "cp.async copies 4, 8 or 16 bytes, and .cg 16 only");
        }
        let (destination, to) = self.address(s, 0)?;
        let (source, from) = self.address(s, 1)?;
        let full = self.constant(Constant::Value(bytes))?;
        let (mut live, mut ignore) = (full, self.constant(Constant::Value(0))?);
        if let Some(o) = s.operands.get(3).cloned() {
            match &o {
                Operand::Name(name)
                    if matches!(self.lookup(name), Some(Symbol::Register(Register { bits: 1, .. }))) =>
                {
                    ignore = self.value(s, &o, Type::Pred)?;
                }
                _ => live = self.value(s, &o, Type::U32)?,
            }
        }
        Ok(Op::CopyAsync { destination, to, source, from, bytes: bytes as u8, live, ignore })
    }

    fn barrier(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        if m.take("warp") {
            self.need(s, m.take_any(&["sync"]))?;
            let mask = Some(self.a(s, 0, Type::B32)?);
            return Ok(Op::Meet(Box::new(Meeting { name: "bar.warp.sync".into(), mask, what: Collective::WarpSync })));
        }
        m.ignore(&["cta"]);
        let kind = self.need(s, m.take_any(&["sync", "arrive", "red"]))?;
        let aligned = m.take("aligned") || s.opcode == "bar";
        let mut op = BarrierOp {
            id: SINK,
            count: SINK,
            wait: kind != "arrive",
            aligned,
            reduction: Reduction::None,
            d: SINK,
            p: TRUE,
            negate: false,
        };
        let mut first = 0;
        if kind == "red" {
            first = 1;
            op.reduction = match m.take_any(&["popc", "and", "or"]) {
                Some("popc") => Reduction::Count,
                Some("and") => Reduction::And,
                Some(_) => Reduction::Or,
                None => return fail(s, "bar.red without an operation"),
            };
            m.ty();
            op.d = self.d(s, 0)?;
            (op.p, op.negate) = self.predicate(s, s.operands.len() - 1)?;
        }
        op.id = self.a(s, first, Type::U32)?;
        let last = s.operands.len() - usize::from(kind == "red");
        if last > first + 1 {
            op.count = self.a(s, first + 1, Type::U32)?;
        }
        if kind == "arrive" && op.count == SINK {
            return fail(s, "bar.arrive without a count");
        }
        Ok(Op::Barrier(Box::new(op)))
    }

    fn collective(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        if s.opcode == "activemask" {
            m.ignore(&["b32"]);
            return Ok(Op::ActiveMask { d: self.d(s, 0)? });
        }
        if !m.take("sync") {
            return fail(s, "only the .sync form is supported");
        }
        let name = format!("{}.{}", s.opcode, s.modifiers.join("."));
        let (mask, what) = match s.opcode.as_str() {
            "shfl" => {
                let mode = match self.need(s, m.take_any(&["up", "down", "bfly", "idx"]))? {
                    "up" => Shuffle::Up,
                    "down" => Shuffle::Down,
                    "bfly" => Shuffle::Butterfly,
                    _ => Shuffle::Index,
                };
                m.ignore(&["b32"]);
                let (d, p) = match self.operand(s, 0)?.clone() {
                    Operand::Pair(d, p) => (self.register(s, &d)?.slot, self.register(s, &p)?.slot),
                    o => (self.register(s, &o)?.slot, SINK),
                };
                let (a, b, c) = (self.a(s, 1, Type::B32)?, self.a(s, 2, Type::B32)?, self.a(s, 3, Type::B32)?);
                (Some(self.a(s, 4, Type::B32)?), Collective::Shuffle { mode, d, p, a, b, c })
            }
            "vote" => {
                let mode = match self.need(s, m.take_any(&["all", "any", "uni", "ballot"]))? {
                    "all" => Vote::All,
                    "any" => Vote::Any,
                    "uni" => Vote::Uniform,
                    _ => Vote::Ballot,
                };
                m.ignore(&["pred", "b32"]);
                let (a, negate) = self.predicate(s, 1)?;
                (Some(self.a(s, 2, Type::B32)?), Collective::Vote { mode, negate, d: self.d(s, 0)?, a })
            }
            "redux" => {
                let op = self.need(s, m.take_any(&["add", "min", "max", "and", "or", "xor"]))?;
                let ty = self.ty(s, m)?;
                let f = self.need(s, arith::integer_binary(op, ty).or(arith::logic(op)))?;
                let a = self.a(s, 1, ty)?;
                (Some(self.a(s, 2, Type::B32)?), Collective::Redux { f, d: self.d(s, 0)?, a })
            }
            "match" => {
                let all = self.need(s, m.take_any(&["any", "all"]))? == "all";
                let ty = self.ty(s, m)?;
                let (d, p) = match self.operand(s, 0)?.clone() {
                    Operand::Pair(d, p) => (self.register(s, &d)?.slot, self.register(s, &p)?.slot),
                    o => (self.register(s, &o)?.slot, SINK),
                };
                let a = self.a(s, 1, ty)?;
                (Some(self.a(s, 2, Type::B32)?), Collective::Match { all, d, p, a })
            }
            "ldmatrix" => {
                self.need(s, m.take_any(&["aligned"]))?;
                self.need(s, m.take_any(&["m8n8"]))?;
                let count = match self.need(s, m.take_any(&["x1", "x2", "x4"]))? {
                    "x1" => 1,
                    "x2" => 2,
                    _ => 4,
                };
                let transposed = m.take("trans");
                self.need(s, m.take_any(&["shared::cta", "shared"]))?;
                self.need(s, m.take_any(&["b16"]))?;
                let list = match self.operand(s, 0)?.clone() {
                    Operand::List(list) => list,
                    o => vec![o],
                };
                if list.len() != usize::from(count) {
                    return fail(s, "the vector has another length");
                }
                let mut d = [SINK; 4];
                for (slot, o) in d.iter_mut().zip(&list) {
                    *slot = self.register(s, o)?.slot;
                }
                let (base, offset) = self.address(s, 1)?;
                (None, Collective::LoadMatrix { count, transposed, base, offset, d })
            }
            _ => {
                self.need(s, m.take_any(&["aligned"]))?;
                let size = m.left.iter().position(|w| w.starts_with('m')).map(|i| m.left.remove(i));
                if !m.take("row") || !m.take("col") {
                    return fail(s, "only mma of row by col is supported");
                }
                let types = [self.ty(s, m)?, self.ty(s, m)?, self.ty(s, m)?, self.ty(s, m)?];
                let shape = self.need(s, Shape::find(size.unwrap_or_default(), types))?;
                let d = match self.operand(s, 0)?.clone() {
                    Operand::List(l) => {
                        l.iter().map(|o| self.register(s, o).map(|r| r.slot)).collect::<Result<Vec<_>, _>>()?
                    }
                    _ => return fail(s, "expected a vector"),
                };
                let (a, b) = (self.vector(s, 1, Type::B32)?, self.vector(s, 2, Type::B32)?);
                let c = self.vector(s, 3, types[3])?;
                let want = shape.registers();
                if [d.len(), a.len(), b.len(), c.len()] != want {
                    return fail(s, "fragments of another size");
                }
                (None, Collective::Mma(Mma { shape, d, a, b, c }))
            }
        };
        Ok(Op::Meet(Box::new(Meeting { name, mask, what })))
    }

    fn call(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        m.ignore(&["uni"]);
        let mut operands = s.operands.iter();
        let mut next = operands.next();
        let returns = matches!(next, Some(Operand::List(_)));
        if returns {
            next = operands.next();
        }
        let Some(Operand::Name(name)) = next else { return fail(s, "only direct calls are supported") };
        if name == "__assertfail" {
            return Ok(Op::AssertFailed);
        }
        if s.guard.is_some() {
            return fail(s, "a guarded call");
        }
        if !self.functions.contains_key(name) && !self.pending.contains(name) {
            self.pending.push(name.clone());
        }
        // The copies of arguments and results around the call are filled in when the callee has been placed.
        let lists = [usize::from(returns) + 1, 0];
        let arguments = match s.operands.get(lists[0]) {
            Some(Operand::List(l)) => l.clone(),
            _ => Vec::new(),
        };
        let results = match s.operands.first() {
            Some(Operand::List(l)) if returns => l.clone(),
            _ => Vec::new(),
        };
        for _ in 0..arguments.len() {
            self.copy_placeholder(s);
        }
        let at = self.code.len();
        self.emit(Op::Call { target: u32::MAX }, None, s.line);
        let mut resolved = s.clone();
        resolved.operands = vec![Operand::List(Vec::new()), Operand::List(Vec::new())];
        let offsets = |d: &Self, list: &[Operand]| -> Result<Vec<Operand>, LoadError> {
            list.iter()
                .map(|o| match o {
                    Operand::Name(n) => match d.lookup(n) {
                        Some(Symbol::Param(at)) => Ok(Operand::Integer(*at)),
                        _ => fail(s, "arguments must be .param variables"),
                    },
                    _ => fail(s, "arguments must be .param variables"),
                })
                .collect()
        };
        resolved.operands = vec![Operand::List(offsets(self, &arguments)?), Operand::List(offsets(self, &results)?)];
        self.calls.push((at, name.clone(), resolved));
        for _ in 0..results.len() {
            self.copy_placeholder(s);
        }
        Ok(Op::Nothing)
    }

    /// A load and a store of parameter memory.
    fn copy_placeholder(&mut self, s: &Statement) {
        self.emit(Op::Nothing, None, s.line);
        self.emit(Op::Nothing, None, s.line);
    }

    fn finish_calls(&mut self) -> Result<(), LoadError> {
        for (at, name, s) in std::mem::take(&mut self.calls) {
            let (target, params, returns) = self.functions[&name].clone();
            // No recursion: a callee placed inside its own call chain would share its registers with itself.
            if self.code[target as usize..].is_empty() || (target as usize <= at && self.reaches(target, &name, at)) {
                return fail(&s, "recursion");
            }
            self.code[at].op = Op::Call { target };
            let function = self.source.functions.iter().find(|f| f.name == name);
            let Some(function) = function else { return fail(&s, "a call of an undefined function") };
            let (sizes, out): (Vec<u64>, Vec<u64>) =
                (function.params.iter().map(|v| v.size).collect(), function.returns.iter().map(|v| v.size).collect());
            let [Operand::List(arguments), Operand::List(results)] = &s.operands[..] else { continue };
            let pairs = |list: &[Operand]| -> Vec<u64> {
                list.iter().map(|o| if let Operand::Integer(v) = o { *v } else { 0 }).collect()
            };
            let (arguments, results) = (pairs(arguments), pairs(results));
            let mut moves = Vec::new();
            for (i, (from, to)) in arguments.iter().zip(&params).enumerate() {
                moves.push((at - 2 * arguments.len() + 2 * i, *from, *to, sizes[i]));
            }
            for (i, (to, from)) in results.iter().zip(&returns).enumerate() {
                moves.push((at + 1 + 2 * i, *from, *to, out[i]));
            }
            for (place, from, to, size) in moves {
                if !matches!(size, 1 | 2 | 4 | 8 | 16) {
                    return fail(&s, "an argument of more than 16 bytes");
                }
                let (bytes, count) = if size == 16 { (8, 2) } else { (size as u8, 1) };
                let regs = [self.new_slot()?, self.new_slot()?, SINK, SINK];
                let zero = self.constant(Constant::Value(0))?;
                let copy = |offset: u64| Access {
                    space: Space::Param,
                    bytes,
                    count,
                    extend: 0,
                    strong: false,
                    acquire: false,
                    release: false,
                    base: zero,
                    offset: offset as i32,
                    regs,
                };
                self.code[place].op = Op::Load(copy(from));
                self.code[place + 1].op = Op::Store(copy(to));
            }
        }
        Ok(())
    }

    /// Whether the call at `at` lies inside the body of `name`.
    fn reaches(&self, target: u32, name: &str, at: usize) -> bool {
        let next = self.functions.iter().filter(|(n, _)| *n != name).map(|(_, f)| f.0).filter(|&t| t > target).min();
        at >= target as usize && next.is_none_or(|t| at < t as usize)
    }
}

/// `.rz`, `.rm` or `.rp`
fn direction(modifier: &str) -> Round {
    match modifier {
        "rz" => Round::Zero,
        "rm" => Round::Down,
        _ => Round::Up,
    }
}

fn sign_extend8(x: u64) -> u64 {
    x as u8 as i8 as u64
}
