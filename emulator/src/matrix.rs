//! Matrix products of a warp: where each lane keeps which element, and how the sum is rounded.
//!
//! Fragment layouts are those of the PTX ISA, section "Matrix fragments for mma".

use half::f16;

use crate::{Rounding, arith::Type};

/// The type of the factors and the depth of one `mma.sync.m16n8kK` with f32 accumulators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    element: Type,
    depth: usize,
}

/// One value of 32 bits for each register of a fragment, for each lane.
pub(crate) type Fragment = [[u32; 4]; 32];

/// The NaN that tensor cores give.
pub(crate) const NAN: u32 = 0x7FFF_FFFF;

impl Shape {
    /// `types` are those of d, a, b and c.
    pub(crate) fn find(size: &str, types: [Type; 4]) -> Option<Shape> {
        let [d, a, b, c] = types;
        if d != Type::F32 || c != Type::F32 || a != b {
            return None;
        }
        let depth = match (size, a) {
            ("m16n8k16", Type::Bf16 | Type::F16) => 16,
            ("m16n8k8", Type::Bf16 | Type::F16 | Type::Tf32) => 8,
            ("m16n8k4", Type::Tf32) => 4,
            _ => return None,
        };
        Some(Shape { element: a, depth })
    }

    /// Registers of d, a, b and c in each lane.
    pub(crate) fn registers(self) -> [usize; 4] {
        let bits = self.element.bits() as usize;
        let a = 16 * self.depth * bits / 32 / 32;
        [4, a, a / 2, 4]
    }

    /// The values in one register: two of 16 bits, or one of tf32, whose low 13 bits are ignored.
    #[inline]
    fn values(self, bits: u32) -> [f32; 2] {
        match self.element {
            // The upper half of an f32.
            Type::Bf16 => [f32::from_bits(bits << 16), f32::from_bits(bits & 0xFFFF_0000)],
            Type::F16 => [f16::from_bits(bits as u16).to_f32(), f16::from_bits((bits >> 16) as u16).to_f32()],
            _ => [f32::from_bits(bits & 0xFFFF_E000), 0.0],
        }
    }

    /// d = a b + c, all lanes at once.
    pub(crate) fn product(self, a: &Fragment, b: &Fragment, c: &Fragment, rounding: Rounding) -> Fragment {
        let per = if self.element == Type::Tf32 { 1 } else { 2 };
        let depth = self.depth;
        let (mut rows, mut columns) = ([[0f32; 16]; 16], [[0f32; 8]; 16]);
        let [_, na, nb, _] = self.registers();
        // Beyond a matrix's edge stand zeros, which change no sum but −0.
        let zeros = |fragment: &Fragment, n: usize| fragment.iter().all(|lane| lane[..n].iter().all(|&bits| bits == 0));
        let finite = |fragment: &Fragment, n: usize| {
            fragment.iter().all(|lane| lane[..n].iter().all(|&bits| self.values(bits).iter().all(|v| v.is_finite())))
        };
        let unchanged = (zeros(a, na) && finite(b, nb)) || (zeros(b, nb) && finite(a, na));
        if unchanged && c.iter().flatten().all(|&v| v != 0x8000_0000) {
            let same = |v: u32| if f32::from_bits(v).is_nan() { NAN } else { v };
            return c.map(|lane| lane.map(same));
        }
        for lane in 0..32 {
            let (group, thread) = (lane / 4, lane % 4);
            for r in 0..na {
                let v = self.values(a[lane][r]);
                for e in 0..per {
                    rows[group + r % 2 * 8][thread * per + e + r / 2 * 4 * per] = v[e];
                }
            }
            for r in 0..nb {
                let v = self.values(b[lane][r]);
                for e in 0..per {
                    columns[thread * per + e + r * 4 * per][group] = v[e];
                }
            }
        }
        let mut d = *c;
        let mut sums = [[0f32; 8]; 16];
        for lane in 0..32 {
            for r in 0..4 {
                sums[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2] = f32::from_bits(c[lane][r]);
            }
        }
        for (row, sum) in rows.iter().zip(&mut sums) {
            match rounding {
                Rounding::F32 => {
                    for (x, column) in row[..depth].iter().zip(&columns) {
                        for (s, y) in sum.iter_mut().zip(column) {
                            *s += x * y;
                        }
                    }
                }
                Rounding::Exact => {
                    for (j, s) in sum.iter_mut().enumerate() {
                        let exact: f64 = (0..depth).map(|k| f64::from(row[k]) * f64::from(columns[k][j])).sum();
                        *s = (f64::from(*s) + exact) as f32;
                    }
                }
                Rounding::Truncate => {
                    for (j, s) in sum.iter_mut().enumerate() {
                        *s = truncated(*s, (0..depth).map(|k| f64::from(row[k]) * f64::from(columns[k][j])));
                    }
                }
            }
        }
        for (lane, d) in d.iter_mut().enumerate() {
            for (r, d) in d.iter_mut().enumerate() {
                let v = sums[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
                *d = if v.is_nan() { NAN } else { v.to_bits() };
            }
        }
        d
    }
}

/// A pessimistic tensor core: every term is aligned to the largest, cut to two bits below f32's, summed, and cut to f32.
pub(crate) fn truncated(c: f32, terms: impl Iterator<Item = f64> + Clone) -> f32 {
    let exponent = |v: f64| (v.to_bits() >> 52 & 0x7FF) as i32 - 1023;
    let top = terms.clone().chain([c.into()]).filter(|v| *v != 0.0 && v.is_finite()).map(exponent).max();
    let Some(top) = top else { return c + terms.sum::<f64>() as f32 };
    let unit = 2f64.powi((top - 25).max(-1022));
    let cut = |v: f64| if v.is_finite() { (v / unit).trunc() * unit } else { v };
    let sum: f64 = cut(c.into()) + terms.map(cut).sum::<f64>();
    let rounded = sum as f32;
    if rounded.is_finite() && f64::from(rounded).abs() > sum.abs() {
        f32::from_bits(rounded.to_bits() - 1)
    } else {
        rounded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_multiplies() {
        for (size, ty) in [
            ("m16n8k16", Type::Bf16),
            ("m16n8k16", Type::F16),
            ("m16n8k8", Type::Bf16),
            ("m16n8k8", Type::Tf32),
            ("m16n8k4", Type::Tf32),
        ] {
            let shape = Shape::find(size, [Type::F32, ty, ty, Type::F32]).unwrap();
            // a = ones, b = ones, c = 1: every d is depth + 1.
            let one = match ty {
                Type::Bf16 => 0x3F80_3F80,
                Type::F16 => 0x3C00_3C00,
                _ => 0x3F80_0000,
            };
            let ones = [[one; 4]; 32];
            let c = [[1f32.to_bits(); 4]; 32];
            for rounding in [Rounding::F32, Rounding::Exact, Rounding::Truncate] {
                let d = shape.product(&ones, &ones, &c, rounding);
                assert!(d.iter().flatten().all(|&v| f32::from_bits(v) == shape.depth as f32 + 1.0), "{size} {ty:?}");
            }
        }
    }

    #[test]
    fn zeros_change_no_sum() {
        let shape = Shape::find("m16n8k16", [Type::F32, Type::Bf16, Type::Bf16, Type::F32]).unwrap();
        let (zeros, ones) = ([[0; 4]; 32], [[0x3F80_3F80; 4]; 32]);
        let mut c = [[0x8000_0001; 4]; 32];
        c[3] = [f32::INFINITY.to_bits(), 0x3F80_0001, 0, 0xFFFF_FFFF];
        let want = c.map(|lane| lane.map(|v| if v == 0xFFFF_FFFF { NAN } else { v }));
        let infinite = [[0x7F80_7F80; 4]; 32];
        for rounding in [Rounding::F32, Rounding::Exact, Rounding::Truncate] {
            assert_eq!(shape.product(&zeros, &ones, &c, rounding), want);
            assert_eq!(shape.product(&ones, &zeros, &c, rounding), want);
            assert_eq!(shape.product(&zeros, &infinite, &c, rounding), [[NAN; 4]; 32]);
            let negative = [[0x8000_0000; 4]; 32];
            assert_eq!(shape.product(&zeros, &ones, &negative, rounding), zeros);
        }
    }

    #[test]
    fn truncation_loses_what_rounding_keeps() {
        let terms = [2f64.powi(-24), 2f64.powi(-24) * 1.5];
        assert_eq!(truncated(1.0, terms.into_iter()), 1.0 + f32::EPSILON);
        assert_eq!(truncated(1.0, [2f64.powi(-24) * 1.9].into_iter()), 1.0);
        assert_eq!(truncated(-1.0, [2f64.powi(-30)].into_iter()), -1.0);
    }
}
