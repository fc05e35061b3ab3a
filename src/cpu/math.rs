//! Vector exponential and what is made of it.

use super::simd::Simd;

/// exp(x), within 2 ulp where the result is normal, gradual underflow, infinities and NaN as they should be.
///
/// x = n·ln 2 + r with |r| ≤ ln 2/2; n is rounded by adding 1.5·2²³, and ln 2 is split so that n times its upper part (9 bits)
/// is exact without a fused multiply-add. exp(r) = 1 + r + r²·p(r) with p the minimax polynomial of degree 4 (error 0.05 of a
/// unit roundoff).
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::Vector) -> S::Vector {
    const P: [f32; 5] = [0.499_999_94, 0.166_665_21, 0.041_668_39, 0.008_368_745, 0.001_381_453_8];
    const LN_2_UPPER: f32 = 355.0 / 512.0;
    const LN_2_LOWER: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0;
    // Beyond these the result is 0 or infinite; the order of the operands keeps NaN.
    let x = s.max(s.splat(-104.0), s.min(s.splat(89.0), x));
    let n = s.sub(s.fma(x, s.splat(std::f32::consts::LOG2_E), s.splat(ROUND)), s.splat(ROUND));
    let r = s.fma(n, s.splat(-LN_2_UPPER), x);
    let r = s.fma(n, s.splat(-LN_2_LOWER), r);
    let mut p = s.splat(P[4]);
    for c in [P[3], P[2], P[1], P[0]] {
        p = s.fma(p, r, s.splat(c));
    }
    let e = s.add(s.fma(s.mul(r, r), p, r), s.splat(1.0));
    s.scale_by_power(e, n)
}

/// log(1 + u) for u in \[0, 1\], within a few ulp: 2 artanh(t) with t = u/(2 + u) ≤ 1/3, as a series.
#[inline(always)]
fn ln_1p<S: Simd>(s: S, u: S::Vector) -> S::Vector {
    let t = s.div(u, s.add(u, s.splat(2.0)));
    let t2 = s.mul(t, t);
    let mut p = s.splat(1.0 / 15.0);
    for k in [13.0, 11.0, 9.0, 7.0, 5.0, 3.0] {
        p = s.fma(p, t2, s.splat(1.0 / k));
    }
    let t = s.add(t, t);
    s.fma(s.mul(t, t2), p, t)
}

/// log(1 + exp z) = max(z, 0) + log(1 + exp(−|z|)).
#[inline(always)]
pub(super) fn softplus<S: Simd>(s: S, z: S::Vector) -> S::Vector {
    let negative = s.sub(s.splat(0.0), z);
    let tail = ln_1p(s, exp(s, s.min(negative, z)));
    s.add(s.max(s.splat(0.0), z), tail)
}

/// The slope of softplus from its value: 1 − exp(−a), by its series where that would cancel.
#[inline(always)]
pub(super) fn softplus_slope<S: Simd>(s: S, a: S::Vector) -> S::Vector {
    let direct = s.sub(s.splat(1.0), exp(s, s.sub(s.splat(0.0), a)));
    let mut series = s.splat(1.0 / 24.0);
    for c in [-1.0 / 6.0, 0.5, -1.0] {
        series = s.fma(series, a, s.splat(c));
    }
    let series = s.mul(s.sub(s.splat(0.0), series), a);
    // `series` where a ≤ 1/32, `direct` elsewhere; both are positive.
    let big = s.zero_unless_positive(s.sub(a, s.splat(1.0 / 32.0)), direct);
    let small = s.zero_unless_positive(s.sub(s.splat(1.0 / 32.0), a), series);
    // At 1/32 itself both are closed; take the series there.
    s.max(s.max(big, small), s.min(direct, series))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{Isa, Task};

    /// A function of a vector applied to a slice.
    struct Map<'a, F>(&'a mut [f32], F);
    trait VectorFunction {
        fn call<S: Simd>(&self, s: S, x: S::Vector) -> S::Vector;
    }
    impl<F: VectorFunction> Task for Map<'_, F> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for chunk in self.0.chunks_mut(S::LANES) {
                let y = self.1.call(s, s.load(chunk));
                s.store(chunk, y);
            }
        }
    }
    struct Exp;
    impl VectorFunction for Exp {
        #[inline(always)]
        fn call<S: Simd>(&self, s: S, x: S::Vector) -> S::Vector {
            exp(s, x)
        }
    }
    struct Softplus;
    impl VectorFunction for Softplus {
        #[inline(always)]
        fn call<S: Simd>(&self, s: S, x: S::Vector) -> S::Vector {
            softplus(s, x)
        }
    }
    struct SoftplusSlope;
    impl VectorFunction for SoftplusSlope {
        #[inline(always)]
        fn call<S: Simd>(&self, s: S, x: S::Vector) -> S::Vector {
            softplus_slope(s, x)
        }
    }

    /// Largest error, in units of the last place, over every `step`-th bit pattern.
    fn worst(f: impl VectorFunction + Copy, truth: impl Fn(f64) -> f64, step: usize) -> Vec<(Isa, f64, f32)> {
        let mut report = Vec::new();
        for isa in Isa::available() {
            let (mut worst, mut at) = (0.0f64, 0.0);
            let mut bits = (0..=u32::MAX).step_by(step).peekable();
            while bits.peek().is_some() {
                let x: Vec<f32> = bits.by_ref().take(1 << 12).map(f32::from_bits).collect();
                let mut y = x.clone();
                isa.run(Map(&mut y, f));
                for (x, y) in x.iter().zip(&y) {
                    let want = truth(f64::from(*x));
                    if want.is_nan() || (want as f32).is_infinite() || want as f32 == 0.0 {
                        assert!(
                            (want.is_nan() && y.is_nan()) || *y == want as f32 || (want as f32 == 0.0 && *y < 3e-45),
                            "{isa:?}: f({x:e}) = {y:e}, want {want:e}"
                        );
                        continue;
                    }
                    let exponent = want.abs().log2().floor().max(-126.0);
                    let error = (f64::from(*y) - want).abs() / 2f64.powf(exponent - 23.0);
                    if error > worst || error.is_nan() {
                        (worst, at) = (error, *x);
                    }
                }
            }
            report.push((isa, worst, at));
        }
        report
    }

    impl Clone for Exp {
        fn clone(&self) -> Self {
            *self
        }
    }
    impl Copy for Exp {}
    impl Clone for Softplus {
        fn clone(&self) -> Self {
            *self
        }
    }
    impl Copy for Softplus {}
    impl Clone for SoftplusSlope {
        fn clone(&self) -> Self {
            *self
        }
    }
    impl Copy for SoftplusSlope {}

    fn assert_within(report: Vec<(Isa, f64, f32)>, ulps: f64) {
        for (isa, worst, at) in report {
            println!("{isa:?}: {worst:.3} ulp at {at:e}");
            assert!(worst <= ulps, "{isa:?}: {worst} ulp at {at:e}");
        }
    }

    #[test]
    fn exp_is_within_two_ulp() {
        assert_within(worst(Exp, f64::exp, 1009), 2.0);
    }

    #[test]
    #[ignore = "all 2^32 inputs take minutes; run with --release -- --ignored"]
    fn exp_is_within_two_ulp_everywhere() {
        assert_within(worst(Exp, f64::exp, 1), 2.0);
    }

    #[test]
    fn softplus_is_within_four_ulp() {
        let truth = |z: f64| if z.is_nan() { z } else { z.max(0.0) + (-z.abs()).exp().ln_1p() };
        assert_within(worst(Softplus, truth, 1009), 4.0);
    }

    #[test]
    fn softplus_slope_is_within_32_ulp() {
        let truth = |a: f64| if a < 0.0 { 0.0 } else { -(-a).exp_m1() };
        for (isa, worst, at) in worst_of_positive(SoftplusSlope, truth) {
            assert!(worst <= 32.0, "{isa:?}: {worst} ulp at {at:e}");
        }
    }

    /// As `worst`, over the values that softplus can have.
    fn worst_of_positive(f: impl VectorFunction + Copy, truth: impl Fn(f64) -> f64) -> Vec<(Isa, f64, f32)> {
        worst(f, |x| if x >= 0.0 { truth(x) } else { f64::NAN }, 1009).into_iter().collect()
    }
}
