//! Arithmetic on 64-bit slots: one function for each operation and type, chosen at load time.
//!
//! A slot keeps the bits of its value in its low end and zeros above. Results of 16 and 32 bits are therefore
//! zero-extended, whatever their sign.

use half::{bf16, f16};

pub(crate) type Unary = fn(u64) -> u64;
pub(crate) type Binary = fn(u64, u64) -> u64;
pub(crate) type Ternary = fn(u64, u64, u64) -> u64;
pub(crate) type Test = fn(u64, u64) -> bool;

/// The types of PTX instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Type {
    B8,
    U8,
    S8,
    B16,
    U16,
    S16,
    B32,
    U32,
    S32,
    B64,
    U64,
    S64,
    B128,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    Tf32,
    F32,
    F64,
    Pred,
}

impl Type {
    pub(crate) fn parse(name: &str) -> Option<Type> {
        use Type::*;
        Some(match name {
            "b8" => B8,
            "u8" => U8,
            "s8" => S8,
            "b16" => B16,
            "u16" => U16,
            "s16" => S16,
            "b32" => B32,
            "u32" => U32,
            "s32" => S32,
            "b64" => B64,
            "u64" => U64,
            "s64" => S64,
            "b128" => B128,
            "f16" => F16,
            "f16x2" => F16x2,
            "bf16" => Bf16,
            "bf16x2" => Bf16x2,
            "tf32" => Tf32,
            "f32" => F32,
            "f64" => F64,
            "pred" => Pred,
            _ => return None,
        })
    }

    pub(crate) fn bits(self) -> u32 {
        use Type::*;
        match self {
            Pred => 1,
            B8 | U8 | S8 => 8,
            B16 | U16 | S16 | F16 | Bf16 => 16,
            B32 | U32 | S32 | F16x2 | Bf16x2 | Tf32 | F32 => 32,
            B64 | U64 | S64 | F64 => 64,
            B128 => 128,
        }
    }

    pub(crate) fn signed(self) -> bool {
        matches!(self, Type::S8 | Type::S16 | Type::S32 | Type::S64)
    }

    pub(crate) fn float(self) -> bool {
        use Type::*;
        matches!(self, F16 | F16x2 | Bf16 | Bf16x2 | Tf32 | F32 | F64)
    }
}

/// The bits below `bits`.
pub(crate) fn low(value: u64, bits: u32) -> u64 {
    if bits >= 64 { value } else { value & ((1 << bits) - 1) }
}

/// Sign-extends the low `bits` of `value` to 64 bits.
pub(crate) fn sign_extend(value: u64, bits: u32) -> i64 {
    if bits >= 64 { value as i64 } else { ((value << (64 - bits)) as i64) >> (64 - bits) }
}

fn f(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}
fn bits(v: f32) -> u64 {
    if v.is_nan() { 0x7FFF_FFFF } else { v.to_bits().into() }
}
fn d(bits: u64) -> f64 {
    f64::from_bits(bits)
}
fn dbits(v: f64) -> u64 {
    if v.is_nan() { 0xFFF8_0000_0000_0000 } else { v.to_bits() }
}
fn h(bits: u64) -> f32 {
    f16::from_bits(bits as u16).to_f32()
}
fn hbits(v: f32) -> u64 {
    if v.is_nan() { 0x7FFF } else { f16::from_f32(v).to_bits().into() }
}
fn b(bits: u64) -> f32 {
    bf16::from_bits(bits as u16).to_f32()
}
fn bbits(v: f32) -> u64 {
    if v.is_nan() { 0x7FFF } else { bf16::from_f32(v).to_bits().into() }
}
fn flush(v: f32) -> f32 {
    if v.is_subnormal() { 0f32.copysign(v) } else { v }
}
fn saturate(v: f32) -> f32 {
    if v > 0.0 { v.min(1.0) } else { 0.0 }
}

macro_rules! for_integers {
    ($ty:expr, $wrap:ident, $body:ident) => {
        match $ty {
            Type::U16 | Type::B16 => $wrap!($body, u16, u16),
            Type::S16 => $wrap!($body, i16, u16),
            Type::U32 | Type::B32 => $wrap!($body, u32, u32),
            Type::S32 => $wrap!($body, i32, u32),
            Type::U64 | Type::B64 => $wrap!($body, u64, u64),
            Type::S64 => $wrap!($body, i64, u64),
            _ => None,
        }
    };
}
macro_rules! one {
    ($body:ident, $t:ty, $u:ty) => {
        Some((|x| $body!(x as $t, $t) as $u as u64) as Unary)
    };
}
macro_rules! two {
    ($body:ident, $t:ty, $u:ty) => {
        Some((|x, y| $body!(x as $t, y as $t, $t) as $u as u64) as Binary)
    };
}
macro_rules! test {
    ($body:ident, $t:ty, $u:ty) => {
        Some((|x, y| $body!(x as $t, y as $t)) as Test)
    };
}

/// Integer arithmetic of two operands.
pub(crate) fn integer_binary(op: &str, ty: Type) -> Option<Binary> {
    macro_rules! add {
        ($a:expr, $b:expr, $t:ty) => {
            $a.wrapping_add($b)
        };
    }
    macro_rules! sub {
        ($a:expr, $b:expr, $t:ty) => {
            $a.wrapping_sub($b)
        };
    }
    macro_rules! mul {
        ($a:expr, $b:expr, $t:ty) => {
            $a.wrapping_mul($b)
        };
    }
    macro_rules! mulhi {
        ($a:expr, $b:expr, $t:ty) => {
            (($a as i128).wrapping_mul($b as i128) >> <$t>::BITS) as $t
        };
    }
    macro_rules! div {
        ($a:expr, $b:expr, $t:ty) => {
            if $b == 0 { !0 } else { $a.wrapping_div($b) }
        };
    }
    macro_rules! rem {
        ($a:expr, $b:expr, $t:ty) => {
            if $b == 0 { $a } else { $a.wrapping_rem($b) }
        };
    }
    macro_rules! min {
        ($a:expr, $b:expr, $t:ty) => {
            ($a).min($b)
        };
    }
    macro_rules! max {
        ($a:expr, $b:expr, $t:ty) => {
            ($a).max($b)
        };
    }
    macro_rules! sat_add {
        ($a:expr, $b:expr, $t:ty) => {
            $a.saturating_add($b)
        };
    }
    macro_rules! sat_sub {
        ($a:expr, $b:expr, $t:ty) => {
            $a.saturating_sub($b)
        };
    }
    match op {
        "add" => for_integers!(ty, two, add),
        "sub" => for_integers!(ty, two, sub),
        "mul.lo" => for_integers!(ty, two, mul),
        "mul.hi" => for_integers!(ty, two, mulhi),
        "div" => for_integers!(ty, two, div),
        "rem" => for_integers!(ty, two, rem),
        "min" => for_integers!(ty, two, min),
        "max" => for_integers!(ty, two, max),
        "add.sat" if ty == Type::S32 => for_integers!(ty, two, sat_add),
        "sub.sat" if ty == Type::S32 => for_integers!(ty, two, sat_sub),
        "mul.wide" => match ty {
            Type::U16 => Some(|x, y| u64::from(x as u16 as u32 * y as u16 as u32)),
            Type::S16 => Some(|x, y| (i32::from(x as i16) * i32::from(y as i16)) as u32 as u64),
            Type::U32 => Some(|x, y| u64::from(x as u32) * u64::from(y as u32)),
            Type::S32 => Some(|x, y| (i64::from(x as i32) * i64::from(y as i32)) as u64),
            _ => None,
        },
        "mul24.lo" => match ty {
            Type::U32 => Some(|x, y| ((x & 0xFF_FFFF) * (y & 0xFF_FFFF)) & 0xFFFF_FFFF),
            Type::S32 => Some(|x, y| (sign_extend(x, 24) * sign_extend(y, 24)) as u32 as u64),
            _ => None,
        },
        _ => None,
    }
}

/// Bitwise arithmetic, which knows only widths; `Pred` included.
pub(crate) fn logic(op: &str) -> Option<Binary> {
    match op {
        "and" => Some(|x, y| x & y),
        "or" => Some(|x, y| x | y),
        "xor" => Some(|x, y| x ^ y),
        _ => None,
    }
}

/// Shifts: an amount of the width or more clears, or fills with the sign.
pub(crate) fn shift(op: &str, ty: Type) -> Option<Binary> {
    fn left<const N: u32>(x: u64, y: u64) -> u64 {
        if y as u32 >= N { 0 } else { low(x << (y as u32), N) }
    }
    fn right<const N: u32>(x: u64, y: u64) -> u64 {
        if y as u32 >= N { 0 } else { low(x, N) >> (y as u32) }
    }
    fn arithmetic<const N: u32>(x: u64, y: u64) -> u64 {
        low((sign_extend(x, N) >> (y as u32).min(63)) as u64, N)
    }
    Some(match (op, ty.bits(), ty.signed()) {
        ("shl", 16, _) => left::<16>,
        ("shl", 32, _) => left::<32>,
        ("shl", 64, _) => left::<64>,
        ("shr", 16, false) => right::<16>,
        ("shr", 32, false) => right::<32>,
        ("shr", 64, false) => right::<64>,
        ("shr", 16, true) => arithmetic::<16>,
        ("shr", 32, true) => arithmetic::<32>,
        ("shr", 64, true) => arithmetic::<64>,
        _ => return None,
    })
}

/// Integer arithmetic of one operand.
pub(crate) fn integer_unary(op: &str, ty: Type) -> Option<Unary> {
    macro_rules! neg {
        ($a:expr, $t:ty) => {
            ($a).wrapping_neg()
        };
    }
    macro_rules! not {
        ($a:expr, $t:ty) => {
            !($a)
        };
    }
    Some(match (op, ty) {
        ("not", Type::Pred) => |x| x ^ 1,
        ("not", _) => return for_integers!(ty, one, not),
        ("neg", _) => return for_integers!(ty, one, neg),
        ("abs", Type::S16) => |x| u64::from((x as i16).wrapping_abs() as u16),
        ("abs", Type::S32) => |x| u64::from((x as i32).wrapping_abs() as u32),
        ("abs", Type::S64) => |x| (x as i64).wrapping_abs() as u64,
        ("popc", _) if matches!(ty.bits(), 32 | 64) => |x| u64::from(x.count_ones()),
        ("clz", Type::B32) => |x| u64::from((x as u32).leading_zeros()),
        ("clz", Type::B64) => |x| u64::from(x.leading_zeros()),
        ("brev", Type::B32) => |x| u64::from((x as u32).reverse_bits()),
        ("brev", Type::B64) => |x| x.reverse_bits(),
        ("bfind", Type::U32) => {
            |x| if x as u32 == 0 { 0xFFFF_FFFF } else { u64::from(31 - (x as u32).leading_zeros()) }
        }
        ("bfind", Type::U64) => |x| if x == 0 { 0xFFFF_FFFF } else { u64::from(63 - x.leading_zeros()) },
        ("bfind", Type::S32) => |x| {
            let x = x as i32;
            let x = (if x < 0 { !x } else { x }) as u32;
            if x == 0 { 0xFFFF_FFFF } else { u64::from(31 - x.leading_zeros()) }
        },
        _ => return None,
    })
}

/// Integer arithmetic of three operands, and the bit moves.
pub(crate) fn integer_ternary(op: &str, ty: Type) -> Option<Ternary> {
    fn extract<const N: u32, const SIGNED: bool>(a: u64, b: u64, c: u64) -> u64 {
        let (position, length) = ((b & 0xFF) as u32, (c & 0xFF) as u32);
        if length == 0 {
            return 0;
        }
        let a = low(a, N);
        let top = (position + length - 1).min(N - 1);
        let sign = SIGNED && a >> top & 1 == 1;
        let field = if position >= N { 0 } else { low(a >> position, length.min(N - position)) };
        let got = if position >= N { 0 } else { length.min(N - position) };
        if sign && got < N { low(field | (!0u64 << got), N) } else { field }
    }
    fn funnel(a: u64, b: u64) -> u64 {
        (b & 0xFFFF_FFFF) << 32 | (a & 0xFFFF_FFFF)
    }
    Some(match (op, ty) {
        ("mad.lo", Type::U16 | Type::S16 | Type::B16) => |a, b, c| low(a.wrapping_mul(b).wrapping_add(c), 16),
        ("mad.lo", Type::U32 | Type::S32) => |a, b, c| low(a.wrapping_mul(b).wrapping_add(c), 32),
        ("mad.lo", Type::U64 | Type::S64) => |a, b, c| a.wrapping_mul(b).wrapping_add(c),
        ("mad.hi", Type::U32) => |a, b, c| low(((a * b) >> 32).wrapping_add(c), 32),
        ("mad.hi", Type::S32) => {
            |a, b, c| low((((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u64).wrapping_add(c), 32)
        }
        ("mad.wide", Type::U16) => |a, b, c| low(u64::from(a as u16) * u64::from(b as u16) + c, 32),
        ("mad.wide", Type::S16) => {
            |a, b, c| low((i64::from(a as i16) * i64::from(b as i16)).wrapping_add(c as i64) as u64, 32)
        }
        ("mad.wide", Type::U32) => |a, b, c| (u64::from(a as u32) * u64::from(b as u32)).wrapping_add(c),
        ("mad.wide", Type::S32) => |a, b, c| (i64::from(a as i32) * i64::from(b as i32)).wrapping_add(c as i64) as u64,
        ("sad", Type::U32) => |a, b, c| low(u64::from((a as u32).abs_diff(b as u32)).wrapping_add(c), 32),
        ("sad", Type::S32) => |a, b, c| low(u64::from((a as i32).abs_diff(b as i32)).wrapping_add(c), 32),
        ("bfe", Type::U32) => extract::<32, false>,
        ("bfe", Type::S32) => extract::<32, true>,
        ("bfe", Type::U64) => extract::<64, false>,
        ("bfe", Type::S64) => extract::<64, true>,
        ("prmt", Type::B32) => |a, b, c| {
            let bytes = (low(a, 32) | b << 32).to_le_bytes();
            (0..4).fold(0, |out, i| {
                let selector = (c >> (4 * i)) & 0xF;
                let byte = bytes[(selector & 7) as usize];
                let byte = if selector & 8 == 0 { byte } else { ((byte as i8) >> 7) as u8 };
                out | u64::from(byte) << (8 * i)
            })
        },
        ("shf.l.wrap", Type::B32) => |a, b, c| low(funnel(a, b) << (c & 31) >> 32, 32),
        ("shf.r.wrap", Type::B32) => |a, b, c| low(funnel(a, b) >> (c & 31), 32),
        ("shf.l.clamp", Type::B32) => |a, b, c| low(((funnel(a, b) as u128) << low(c, 32).min(32) >> 32) as u64, 32),
        ("shf.r.clamp", Type::B32) => |a, b, c| low(funnel(a, b) >> low(c, 32).min(32), 32),
        ("selp", _) => |a, b, c| if c != 0 { a } else { b },
        ("slct.s32", _) => |a, b, c| if c as i32 >= 0 { a } else { b },
        _ => return None,
    })
}

/// `bfi`: a's low bits inserted into b.
pub(crate) fn bit_insert(a: u64, b: u64, position: u64, length: u64, width: u32) -> u64 {
    let (position, length) = ((position & 0xFF) as u32, (length & 0xFF) as u32);
    if length == 0 || position >= width {
        return b;
    }
    let length = length.min(width - position);
    let mask = low(!0, length) << position;
    (b & !mask) | ((a << position) & mask)
}

/// `lop3`: any function of three bits, by its truth table.
pub(crate) fn lop3(a: u64, b: u64, c: u64, table: u8) -> u64 {
    let mut out = 0;
    for row in 0..8u8 {
        if table >> row & 1 == 1 {
            let a = if row & 4 == 0 { !a } else { a };
            let b = if row & 2 == 0 { !b } else { b };
            let c = if row & 1 == 0 { !c } else { c };
            out |= a & b & c;
        }
    }
    out
}

/// minNum and maxNum of the ISA: a NaN loses, −0 is below +0.
fn minimum(a: f64, b: f64) -> f64 {
    if a == b { if a.is_sign_negative() { a } else { b } } else { a.min(b) }
}
fn maximum(a: f64, b: f64) -> f64 {
    if a == b { if a.is_sign_negative() { b } else { a } } else { a.max(b) }
}
fn minimum_nan(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { minimum(a, b) }
}
fn maximum_nan(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { maximum(a, b) }
}

macro_rules! f32_two {
    ($ftz:expr, $sat:expr, |$a:ident, $b:ident| $body:expr) => {
        match ($ftz, $sat) {
            (false, false) => Some(
                (|$a, $b| {
                    let ($a, $b) = (f($a), f($b));
                    bits($body)
                }) as Binary,
            ),
            (true, false) => Some(
                (|$a, $b| {
                    let ($a, $b) = (flush(f($a)), flush(f($b)));
                    bits(flush($body))
                }) as Binary,
            ),
            (false, true) => Some(
                (|$a, $b| {
                    let ($a, $b) = (f($a), f($b));
                    bits(saturate($body))
                }) as Binary,
            ),
            (true, true) => Some(
                (|$a, $b| {
                    let ($a, $b) = (flush(f($a)), flush(f($b)));
                    bits(saturate(flush($body)))
                }) as Binary,
            ),
        }
    };
}
macro_rules! f32_one {
    ($ftz:expr, |$a:ident| $body:expr) => {
        if $ftz {
            Some(
                (|$a| {
                    let $a = flush(f($a));
                    bits(flush($body))
                }) as Unary,
            )
        } else {
            Some(
                (|$a| {
                    let $a = f($a);
                    bits($body)
                }) as Unary,
            )
        }
    };
}
macro_rules! pair {
    ($from:ident, $to:ident, |$a:ident, $b:ident| $body:expr) => {
        Some(
            (|x: u64, y: u64| {
                let low = {
                    let ($a, $b) = ($from(x), $from(y));
                    $to($body)
                };
                let high = {
                    let ($a, $b) = ($from(x >> 16), $from(y >> 16));
                    $to($body)
                };
                high << 16 | low
            }) as Binary,
        )
    };
}
macro_rules! halves {
    ($ty:expr, |$a:ident, $b:ident| $body:expr) => {
        match $ty {
            Type::F16 => Some(
                (|$a, $b| {
                    let ($a, $b) = (h($a), h($b));
                    hbits($body)
                }) as Binary,
            ),
            Type::Bf16 => Some(
                (|$a, $b| {
                    let ($a, $b) = (b($a), b($b));
                    bbits($body)
                }) as Binary,
            ),
            Type::F16x2 => pair!(h, hbits, |$a, $b| $body),
            Type::Bf16x2 => pair!(b, bbits, |$a, $b| $body),
            _ => None,
        }
    };
}

/// Floating-point arithmetic of two operands; `op` carries `.nan` for the variants that propagate NaN.
pub(crate) fn float_binary(op: &str, ty: Type, ftz: bool, sat: bool) -> Option<Binary> {
    match ty {
        Type::F32 => match op {
            "add" => f32_two!(ftz, sat, |x, y| x + y),
            "sub" => f32_two!(ftz, sat, |x, y| x - y),
            "mul" => f32_two!(ftz, sat, |x, y| x * y),
            "div" => f32_two!(ftz, sat, |x, y| x / y),
            "min" => f32_two!(ftz, sat, |x, y| minimum(x.into(), y.into()) as f32),
            "max" => f32_two!(ftz, sat, |x, y| maximum(x.into(), y.into()) as f32),
            "min.nan" => f32_two!(ftz, sat, |x, y| minimum_nan(x.into(), y.into()) as f32),
            "max.nan" => f32_two!(ftz, sat, |x, y| maximum_nan(x.into(), y.into()) as f32),
            "copysign" => Some(|x, y| (y & 0x7FFF_FFFF) | (x & 0x8000_0000)),
            _ => None,
        },
        Type::F64 if !ftz && !sat => match op {
            "add" => Some(|x, y| dbits(d(x) + d(y))),
            "sub" => Some(|x, y| dbits(d(x) - d(y))),
            "mul" => Some(|x, y| dbits(d(x) * d(y))),
            "div" => Some(|x, y| dbits(d(x) / d(y))),
            "min" => Some(|x, y| dbits(minimum(d(x), d(y)))),
            "max" => Some(|x, y| dbits(maximum(d(x), d(y)))),
            "copysign" => Some(|x, y| (y & !(1 << 63)) | (x & (1 << 63))),
            _ => None,
        },
        _ if sat || ftz => None,
        // An f32 result of two 8- or 11-bit factors, rounded again, equals the result rounded once.
        _ => match op {
            "add" => halves!(ty, |x, y| x + y),
            "sub" => halves!(ty, |x, y| x - y),
            "mul" => halves!(ty, |x, y| x * y),
            "min" => halves!(ty, |x, y| minimum(x.into(), y.into()) as f32),
            "max" => halves!(ty, |x, y| maximum(x.into(), y.into()) as f32),
            "min.nan" => halves!(ty, |x, y| minimum_nan(x.into(), y.into()) as f32),
            "max.nan" => halves!(ty, |x, y| maximum_nan(x.into(), y.into()) as f32),
            _ => None,
        },
    }
}

/// Floating-point arithmetic of one operand. The approximate functions are computed in f64 and rounded: closer than
/// the hardware, whose error is bounded in the ISA.
pub(crate) fn float_unary(op: &str, ty: Type, ftz: bool) -> Option<Unary> {
    match (op, ty) {
        ("neg", Type::F32) if !ftz => Some(|x| (x ^ 0x8000_0000) & 0xFFFF_FFFF),
        ("abs", Type::F32) if !ftz => Some(|x| x & 0x7FFF_FFFF),
        ("neg", Type::F32) => f32_one!(ftz, |x| -x),
        ("abs", Type::F32) => f32_one!(ftz, |x| x.abs()),
        ("neg", Type::F64) => Some(|x| x ^ (1 << 63)),
        ("abs", Type::F64) => Some(|x| x & !(1 << 63)),
        ("neg", Type::F16 | Type::Bf16) => Some(|x| x ^ 0x8000),
        ("abs", Type::F16 | Type::Bf16) => Some(|x| x & 0x7FFF),
        ("neg", Type::F16x2 | Type::Bf16x2) => Some(|x| x ^ 0x8000_8000),
        ("abs", Type::F16x2 | Type::Bf16x2) => Some(|x| x & 0x7FFF_7FFF),
        ("ex2", Type::F32) => f32_one!(ftz, |x| f64::from(x).exp2() as f32),
        ("lg2", Type::F32) => f32_one!(ftz, |x| f64::from(x).log2() as f32),
        ("rcp", Type::F32) => f32_one!(ftz, |x| 1.0 / x),
        ("sqrt", Type::F32) => f32_one!(ftz, |x| x.sqrt()),
        ("rsqrt", Type::F32) => f32_one!(ftz, |x| (1.0 / f64::from(x).sqrt()) as f32),
        ("sin", Type::F32) => f32_one!(ftz, |x| f64::from(x).sin() as f32),
        ("cos", Type::F32) => f32_one!(ftz, |x| f64::from(x).cos() as f32),
        ("tanh", Type::F32) => f32_one!(ftz, |x| f64::from(x).tanh() as f32),
        ("rcp", Type::F64) if !ftz => Some(|x| dbits(1.0 / d(x))),
        ("sqrt", Type::F64) if !ftz => Some(|x| dbits(d(x).sqrt())),
        ("rsqrt", Type::F64) if !ftz => Some(|x| dbits(1.0 / d(x).sqrt())),
        // The high word of a reciprocal, from which nvcc starts its f64 division.
        ("rcp.ftz", Type::F64) => Some(|x| dbits(1.0 / d(x)) & !0xFFFF_FFFF),
        ("ex2", Type::F16) => Some(|x| hbits(h(x).exp2())),
        ("tanh", Type::F16) => Some(|x| hbits(h(x).tanh())),
        _ => None,
    }
}

/// a b + c in f32, rounded down, up or towards zero: exactly, from an f64 sum and its error.
fn directed(a: f32, b: f32, c: f32, round: Round) -> f32 {
    let (p, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let s = p + c;
    if !s.is_finite() {
        return s as f32;
    }
    let part = s - p;
    let error = (p - (s - part)) + (c - part);
    let r = s as f32;
    let (below, above) = match f64::from(r).partial_cmp(&s) {
        Some(std::cmp::Ordering::Less) => (true, false),
        Some(std::cmp::Ordering::Greater) => (false, true),
        _ => (error > 0.0, error < 0.0),
    };
    match round {
        Round::Down if above => r.next_down(),
        Round::Up if below => r.next_up(),
        Round::Zero if above && s > 0.0 => r.next_down(),
        Round::Zero if below && s < 0.0 => r.next_up(),
        _ => r,
    }
}

/// `add`, `sub`, `mul` and `fma` of f32 with a directed rounding; the operands that the first three lack are ignored.
pub(crate) fn directed_f32(op: &str, round: Round) -> Option<Ternary> {
    macro_rules! by_round {
        (|$a:ident, $b:ident, $c:ident| $x:expr, $y:expr, $z:expr) => {
            match round {
                Round::Down => Some((|$a, $b, $c| bits(directed($x, $y, $z, Round::Down))) as Ternary),
                Round::Up => Some((|$a, $b, $c| bits(directed($x, $y, $z, Round::Up))) as Ternary),
                Round::Zero => Some((|$a, $b, $c| bits(directed($x, $y, $z, Round::Zero))) as Ternary),
                _ => None,
            }
        };
    }
    match op {
        "fma" | "mad" => by_round!(|a, b, c| f(a), f(b), f(c)),
        "add" => by_round!(|a, b, _c| f(a), 1.0, f(b)),
        "sub" => by_round!(|a, b, _c| f(a), 1.0, -f(b)),
        "mul" => by_round!(|a, b, _c| f(a), f(b), 0.0),
        _ => None,
    }
}

/// Fused multiply-add.
pub(crate) fn fma(ty: Type, ftz: bool, sat: bool, relu: bool) -> Option<Ternary> {
    fn half_fma(a: f32, b: f32, c: f32) -> f32 {
        // The product is exact in f64 and so is nearly every sum; rounding to odd protects the second rounding.
        let (p, c) = (f64::from(a) * f64::from(b), f64::from(c));
        let s = p + c;
        let error = (p - (s - (s - p))) + (c - (s - p));
        let odd = if error != 0.0 && s.is_finite() && s.to_bits() & 1 == 0 {
            let toward = (error > 0.0) == (s > 0.0);
            f64::from_bits(if toward { s.to_bits() + 1 } else { s.to_bits() - 1 })
        } else {
            s
        };
        // f64 to f32 to odd again, then the caller rounds to 16 bits.
        let r = odd as f32;
        if f64::from(r) != odd && r.is_finite() && r.to_bits() & 1 == 0 {
            let up = (f64::from(r) < odd) == (r > 0.0);
            f32::from_bits(if up { r.to_bits() + 1 } else { r.to_bits() - 1 })
        } else {
            r
        }
    }
    macro_rules! two_at_once {
        ($from:ident, $to:ident, $post:expr) => {
            Some(
                (|x, y, z| {
                    let low = $to($post(half_fma($from(x), $from(y), $from(z))));
                    let high = $to($post(half_fma($from(x >> 16), $from(y >> 16), $from(z >> 16))));
                    high << 16 | low
                }) as Ternary,
            )
        };
    }
    fn keep(v: f32) -> f32 {
        v
    }
    fn rectify(v: f32) -> f32 {
        if v.is_nan() || v > 0.0 { v } else { 0.0 }
    }
    match (ty, ftz, sat, relu) {
        (Type::F32, false, false, false) => Some(|x, y, z| bits(f(x).mul_add(f(y), f(z)))),
        (Type::F32, true, false, false) => Some(|x, y, z| bits(flush(flush(f(x)).mul_add(flush(f(y)), flush(f(z)))))),
        (Type::F32, false, true, false) => Some(|x, y, z| bits(saturate(f(x).mul_add(f(y), f(z))))),
        (Type::F32, true, true, false) => {
            Some(|x, y, z| bits(saturate(flush(flush(f(x)).mul_add(flush(f(y)), flush(f(z)))))))
        }
        (Type::F64, false, false, false) => Some(|x, y, z| dbits(d(x).mul_add(d(y), d(z)))),
        (Type::F16, false, false, false) => Some(|x, y, z| hbits(half_fma(h(x), h(y), h(z)))),
        (Type::Bf16, false, false, false) => Some(|x, y, z| bbits(half_fma(b(x), b(y), b(z)))),
        (Type::F16x2, false, false, false) => two_at_once!(h, hbits, keep),
        (Type::Bf16x2, false, false, false) => two_at_once!(b, bbits, keep),
        (Type::F16x2, false, false, true) => two_at_once!(h, hbits, rectify),
        (Type::Bf16x2, false, false, true) => two_at_once!(b, bbits, rectify),
        _ => None,
    }
}

/// `setp` and `set`: the comparison.
#[allow(clippy::neg_cmp_op_on_partial_ord)] // the unordered comparisons are true for NaN
pub(crate) fn compare(op: &str, ty: Type, ftz: bool) -> Option<Test> {
    macro_rules! eq {
        ($a:expr, $b:expr) => {
            $a == $b
        };
    }
    macro_rules! ne {
        ($a:expr, $b:expr) => {
            $a != $b
        };
    }
    macro_rules! lt {
        ($a:expr, $b:expr) => {
            ($a) < ($b)
        };
    }
    macro_rules! le {
        ($a:expr, $b:expr) => {
            ($a) <= ($b)
        };
    }
    macro_rules! gt {
        ($a:expr, $b:expr) => {
            ($a) > ($b)
        };
    }
    macro_rules! ge {
        ($a:expr, $b:expr) => {
            ($a) >= ($b)
        };
    }
    if ty == Type::Pred {
        return None;
    }
    if !ty.float() {
        return match op {
            "eq" => for_integers!(ty, test, eq),
            "ne" => for_integers!(ty, test, ne),
            "lt" | "lo" => for_integers!(ty, test, lt),
            "le" | "ls" => for_integers!(ty, test, le),
            "gt" | "hi" => for_integers!(ty, test, gt),
            "ge" | "hs" => for_integers!(ty, test, ge),
            _ => None,
        };
    }
    macro_rules! floats {
        ($read:expr) => {
            match op {
                "eq" => Some((|x, y| $read(x) == $read(y)) as Test),
                "ne" => Some((|x, y| $read(x) < $read(y) || $read(x) > $read(y)) as Test),
                "lt" => Some((|x, y| $read(x) < $read(y)) as Test),
                "le" => Some((|x, y| $read(x) <= $read(y)) as Test),
                "gt" => Some((|x, y| $read(x) > $read(y)) as Test),
                "ge" => Some((|x, y| $read(x) >= $read(y)) as Test),
                "equ" => Some((|x, y| !($read(x) < $read(y) || $read(x) > $read(y))) as Test),
                "neu" => Some((|x, y| $read(x) != $read(y)) as Test),
                "ltu" => Some((|x, y| !($read(x) >= $read(y))) as Test),
                "leu" => Some((|x, y| !($read(x) > $read(y))) as Test),
                "gtu" => Some((|x, y| !($read(x) <= $read(y))) as Test),
                "geu" => Some((|x, y| !($read(x) < $read(y))) as Test),
                "num" => Some((|x, y| !$read(x).is_nan() && !$read(y).is_nan()) as Test),
                "nan" => Some((|x, y| $read(x).is_nan() || $read(y).is_nan()) as Test),
                _ => None,
            }
        };
    }
    fn flushed(x: u64) -> f32 {
        flush(f(x))
    }
    match (ty, ftz) {
        (Type::F32, false) => floats!(f),
        (Type::F32, true) => floats!(flushed),
        (Type::F64, false) => floats!(d),
        (Type::F16, false) => floats!(h),
        (Type::Bf16, false) => floats!(b),
        _ => None,
    }
}

/// How a floating-point result is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Round {
    Nearest,
    NearestAway,
    Zero,
    Down,
    Up,
}

/// A `cvt` that involves floating point.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Convert {
    pub from: Type,
    pub to: Type,
    pub round: Round,
    /// Round to an integral value, in the floating-point format.
    pub integral: bool,
    pub ftz: bool,
    pub sat: bool,
    pub relu: bool,
    /// Width of the destination register.
    pub register: u8,
}

/// A rounding to `digits` significand bits with smallest exponent `least` (of the leading bit), exact inputs in f64.
fn round_to(v: f64, digits: i32, least: i32, round: Round) -> f64 {
    if v == 0.0 || !v.is_finite() {
        return v;
    }
    let exponent = (v.to_bits() >> 52 & 0x7FF) as i32 - 1023; // subnormal f64 never arises from the formats here
    let unit = 2f64.powi(exponent.max(least) - (digits - 1));
    integral(v / unit, round) * unit
}

fn integral(v: f64, round: Round) -> f64 {
    match round {
        Round::Nearest => v.round_ties_even(),
        Round::NearestAway => v.round(),
        Round::Zero => v.trunc(),
        Round::Down => v.floor(),
        Round::Up => v.ceil(),
    }
}

impl Convert {
    pub(crate) fn apply(&self, x: u64) -> u64 {
        use Type::*;
        // Integers of 64 bits do not fit f64: they are rounded by Rust's conversion when the rounding is nearest.
        if self.to == F32 && self.round == Round::Nearest && !self.sat {
            match self.from {
                S64 => return bits(x as i64 as f32),
                U64 => return bits(x as f32),
                _ => {}
            }
        }
        let v: f64 = match self.from {
            U8 | U16 | U32 | B8 | B16 | B32 => low(x, self.from.bits()) as f64,
            S8 | S16 | S32 | S64 => sign_extend(x, self.from.bits()) as f64,
            U64 | B64 => x as f64,
            F16 => h(x).into(),
            Bf16 => b(x).into(),
            F32 | Tf32 => if self.ftz { flush(f(x)) } else { f(x) }.into(),
            F64 => d(x),
            _ => f64::NAN,
        };
        if !self.to.float() {
            return self.integer(v);
        }
        let mut v = if self.integral { integral(v, self.round) } else { v };
        if self.relu && !v.is_nan() && v <= 0.0 {
            v = 0.0;
        }
        if self.sat {
            v = if v > 0.0 { v.min(1.0) } else { 0.0 };
        }
        let (digits, least, largest) = match self.to {
            F16 => (11, -14, 65504.0),
            Bf16 => (8, -126, f64::from(bf16::MAX.to_f32())),
            Tf32 => (11, -126, f64::from(f32::MAX)),
            F32 => (24, -126, f64::from(f32::MAX)),
            _ => return dbits(v),
        };
        let rounded = round_to(v, digits, least, self.round);
        let rounded = if rounded.is_finite() && rounded.abs() > largest {
            let stays = match self.round {
                Round::Zero => true,
                Round::Down => v > 0.0,
                Round::Up => v < 0.0,
                _ => false,
            };
            (if stays { largest } else { f64::INFINITY }).copysign(v)
        } else {
            rounded
        };
        let out = rounded as f32;
        match self.to {
            F16 => hbits(out),
            Bf16 => bbits(out),
            F32 if self.ftz => bits(flush(out)),
            _ => bits(out),
        }
    }

    fn integer(&self, v: f64) -> u64 {
        let v = integral(v, self.round);
        let value = match self.to {
            Type::S8 => i64::from(v as i8) as u64,
            Type::S16 => i64::from(v as i16) as u64,
            Type::S32 => i64::from(v as i32) as u64,
            Type::S64 => v as i64 as u64,
            Type::U8 => u64::from(v as u8),
            Type::U16 => u64::from(v as u16),
            Type::U32 => u64::from(v as u32),
            _ => v as u64,
        };
        // On the chip a NaN becomes 0 for 8, 16 and 32 bits and 1 << 63 for 64 bits.
        let value = if v.is_nan() && self.to.bits() == 64 { 1 << 63 } else { value };
        low(value, self.register.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn convert(from: Type, to: Type, round: Round, x: u64) -> u64 {
        let register = to.bits() as u8;
        Convert { from, to, round, integral: false, ftz: false, sat: false, relu: false, register }.apply(x)
    }

    #[test]
    fn floats_round_as_half_does() {
        let mut x = 0x1234_5678u32;
        for _ in 0..200_000 {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let v = f32::from_bits(x);
            if v.is_nan() {
                continue;
            }
            assert_eq!(convert(Type::F32, Type::Bf16, Round::Nearest, x.into()), bf16::from_f32(v).to_bits().into());
            assert_eq!(convert(Type::F32, Type::F16, Round::Nearest, x.into()), f16::from_f32(v).to_bits().into());
            let cut = f32::from_bits(convert(Type::F32, Type::Tf32, Round::NearestAway, x.into()) as u32);
            assert_eq!(cut.to_bits() & 0x1FFF, 0);
        }
    }

    #[test]
    fn directed_rounding() {
        let v = 1.0f64 + 2f64.powi(-30);
        assert_eq!(f(convert(Type::F64, Type::F32, Round::Zero, v.to_bits())), 1.0);
        assert_eq!(f(convert(Type::F64, Type::F32, Round::Up, v.to_bits())), 1.0 + f32::EPSILON);
        assert_eq!(convert(Type::F64, Type::F16, Round::Zero, 1e9f64.to_bits()), 0x7BFF);
        assert_eq!(convert(Type::F64, Type::F16, Round::Nearest, 1e9f64.to_bits()), 0x7C00);
        assert_eq!(convert(Type::F32, Type::S32, Round::Zero, bits(-1.75)) as u32 as i32, -1);
        assert_eq!(convert(Type::F32, Type::S32, Round::Down, bits(-1.25)) as u32 as i32, -2);
        assert_eq!(convert(Type::F32, Type::U32, Round::Zero, bits(-5.0)), 0);
    }

    #[test]
    fn directed_sums() {
        let tiny = 2f32.powi(-40);
        for (round, want) in [(Round::Down, 1.0), (Round::Up, 1.0 + f32::EPSILON), (Round::Zero, 1.0)] {
            let add = directed_f32("add", round).unwrap();
            assert_eq!(f(add(bits(1.0), bits(tiny), 0)), want);
        }
        let fma = directed_f32("fma", Round::Down).unwrap();
        assert_eq!(f(fma(bits(-1.0), bits(1.0), bits(-1e-30))), (-1f32).next_down());
        assert_eq!(f(fma(bits(252.0), bits(0.5), bits(12_582_913.0))), 12_583_039.0);
    }

    #[test]
    fn bits_move_as_the_isa_says() {
        let bfe = integer_ternary("bfe", Type::S32).unwrap();
        assert_eq!(bfe(0xF0, 4, 4) as u32 as i32, -1);
        assert_eq!(bfe(0x70, 4, 4), 7);
        assert_eq!(bfe(0x8000_0000, 28, 8) as u32 as i32, -8);
        assert_eq!(bit_insert(0xFF, 0, 4, 4, 32), 0xF0);
        let prmt = integer_ternary("prmt", Type::B32).unwrap();
        assert_eq!(prmt(0x4433_2211, 0x8877_6655, 0x5410), 0x6655_2211);
        assert_eq!(prmt(0x80, 0, 0x8888), 0xFFFF_FFFF);
        assert_eq!(low(lop3(0xF0, 0xCC, 0xAA, 0x96), 8), 0xF0 ^ 0xCC ^ 0xAA);
        let left = integer_ternary("shf.l.wrap", Type::B32).unwrap();
        assert_eq!(left(0x8000_0000, 1, 1), 3);
        assert_eq!(integer_binary("mul.hi", Type::S32).unwrap()(u64::from(-2i32 as u32), 3), 0xFFFF_FFFF);
        assert_eq!(integer_binary("mul.hi", Type::U64).unwrap()(u64::MAX, u64::MAX), u64::MAX - 1);
        assert_eq!(shift("shr", Type::S32).unwrap()(0x8000_0000, 40), 0xFFFF_FFFF);
    }

    #[test]
    fn extremes_know_nan_and_zero() {
        let max = float_binary("max", Type::F32, false, false).unwrap();
        let max_nan = float_binary("max.nan", Type::F32, false, false).unwrap();
        assert_eq!(f(max(bits(f32::NAN), bits(1.0))), 1.0);
        assert_eq!(max_nan(bits(f32::NAN), bits(1.0)), 0x7FFF_FFFF);
        assert_eq!(max(bits(-0.0), bits(0.0)), 0);
        let min = float_binary("min", Type::F32, false, false).unwrap();
        assert_eq!(min(bits(0.0), bits(-0.0)), 0x8000_0000);
    }

    #[test]
    fn comparisons_know_nan() {
        let (nan, one) = (bits(f32::NAN), bits(1.0));
        for (op, want) in
            [("eq", false), ("ne", false), ("neu", true), ("equ", true), ("ltu", true), ("lt", false), ("nan", true)]
        {
            assert_eq!(compare(op, Type::F32, false).unwrap()(nan, one), want, "{op}");
        }
    }
}
