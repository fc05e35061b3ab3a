//! Storage types: every conversion rounds to the nearest number, and of two equally near to the even one.

mod common;

use common::{rng, uniform};
use sae_kernels::{Element, bf16, f16};

/// Numbers around ties of `T`, in `f64`: a tie, and a hair to either side.
fn around_ties<T: Element>() -> Vec<f64> {
    let ulp = 2.0 * T::UNIT_ROUNDOFF;
    let mut values = uniform(&mut rng(7), 2000, 3.0);
    for odd in 0..64 {
        let tie = 1.0 + (f64::from(odd) + 0.5) * ulp;
        for hair in [0.0, 2f64.powi(-40), 2f64.powi(-23), 2f64.powi(-20)] {
            values.extend([tie + hair, tie - hair, -tie - hair, -tie + hair]);
        }
    }
    values
}

fn check_nearest<T: Element>(convert: impl Fn(f64) -> T, values: &[f64]) {
    for value in values {
        let found = convert(*value).to_f64();
        let nearest: f64 = common::store::<T>(*value).to_f64();
        assert_eq!(found, nearest, "{}: {value:e}", T::NAME);
        assert!(
            (found - value).abs() <= T::UNIT_ROUNDOFF * value.abs().max(1e-3),
            "{}: {value:e} as {found:e}",
            T::NAME
        );
    }
}

#[test]
fn from_f32_rounds_to_nearest() {
    fn check<T: Element>() {
        let exact: Vec<f64> = around_ties::<T>().iter().map(|v| f64::from(*v as f32)).collect();
        check_nearest::<T>(|v| T::from_f32(v as f32), &exact);
        let mut narrowed = vec![T::from_f32(0.0); exact.len()];
        let singles: Vec<f32> = exact.iter().map(|v| *v as f32).collect();
        T::narrow(&singles, &mut narrowed);
        assert!(narrowed.iter().zip(&singles).all(|(n, s)| *n == T::from_f32(*s)), "{}", T::NAME);
        let mut widened = vec![0f32; exact.len()];
        T::widen(&narrowed, &mut widened);
        assert!(widened.iter().zip(&narrowed).all(|(w, n)| *w == n.to_f32()), "{}", T::NAME);
    }
    check::<f32>();
    check::<bf16>();
    check::<f16>();
}

#[test]
fn from_f64_rounds_to_nearest() {
    check_nearest::<f64>(f64::from_f64, &around_ties::<f32>());
    check_nearest::<f32>(f32::from_f64, &around_ties::<f32>());
}

/// `half` drops the lower half of an `f64` before it rounds, so numbers a hair above a tie count as ties.
#[test]
#[ignore = "half 2.7 rounds f64 twice; Element::from_f64 of bf16 and f16 inherits it"]
fn from_f64_rounds_half_precision_to_nearest() {
    check_nearest::<bf16>(<bf16 as Element>::from_f64, &around_ties::<bf16>());
    check_nearest::<f16>(<f16 as Element>::from_f64, &around_ties::<f16>());
}

#[test]
fn nothing_that_is_not_finite_is_lost() {
    fn check<T: Element>() {
        assert!(T::from_f32(f32::NAN).to_f32().is_nan() && T::from_f64(f64::NAN).to_f64().is_nan());
        for sign in [1.0, -1.0] {
            assert_eq!(T::from_f32(sign * f32::INFINITY).to_f64(), f64::from(sign) * f64::INFINITY);
            assert_eq!(T::from_f64(f64::from(sign) * f64::INFINITY).to_f32(), sign * f32::INFINITY);
        }
    }
    check::<f64>();
    check::<f32>();
    check::<bf16>();
    check::<f16>();
}
