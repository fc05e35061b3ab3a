//! The reference: plain `f64` loops, one readable function an operation.
//!
//! It is what the other backends are tested against, so it is written to be checked by eye against the formulas of
//! [`operations`](crate::operations), never to be fast. It takes no workspace and allocates freely.

mod backward;
mod decode;
mod dual;
mod encode;
mod optimizer;
mod product;
mod redundancy;
mod statistics;

use crate::backend::{Backend, Shape};
use crate::element::Element;
use crate::error::Result;
use crate::matrix::Host;
use crate::objective::Activation;
use crate::operations::*;

/// The `f64` reference backend.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reference;

impl Backend for Reference {
    type Memory = Host;
    type Element = f64;
    type Real = f64;

    fn alloc<T: Element>(&self, len: usize) -> Result<Vec<T>> {
        Host::alloc(len)
    }
    fn upload<T: Element>(&self, source: &[T], target: &mut [T]) -> Result<()> {
        Host::copy(source, target)
    }
    fn download<T: Element>(&self, source: &[T], target: &mut [T]) -> Result<()> {
        Host::copy(source, target)
    }
    fn workspace_len_of(&self, _: Operation, _: Shape) -> Result<usize> {
        Ok(0)
    }

    fn encode(&self, args: Encode<'_, Self>) -> Result<()> {
        encode::encode(args)
    }
    fn activation_sums(&self, args: ActivationSums<'_, Self>) -> Result<()> {
        encode::activation_sums(args)
    }
    fn responsibilities(&self, args: Responsibilities<'_, Self>) -> Result<()> {
        encode::responsibilities(args)
    }
    fn recentre(&self, args: Recentre<'_, Self>) -> Result<()> {
        statistics::recentre(args)
    }
    fn comoments(&self, args: Comoments<'_, Self>) -> Result<()> {
        statistics::comoments(args)
    }
    fn pack_statistics(&self, args: PackStatistics<'_, Self>) -> Result<()> {
        statistics::pack_statistics(args)
    }
    fn unpack_statistics(&self, args: UnpackStatistics<'_, Self>) -> Result<()> {
        statistics::unpack_statistics(args)
    }
    fn finish_statistics(&self, args: FinishStatistics<'_, Self>) -> Result<()> {
        statistics::finish_statistics(args)
    }
    fn correlation_dual(&self, args: CorrelationDual<'_, Self>) -> Result<()> {
        dual::correlation_dual(args)
    }
    fn backward_dz(&self, args: BackwardDz<'_, Self>) -> Result<()> {
        backward::backward_dz(args)
    }
    fn product(&self, args: Product<'_, Self>) -> Result<()> {
        product::product(args)
    }
    fn column_sums(&self, args: ColumnSums<'_, Self>) -> Result<()> {
        product::column_sums(args)
    }
    fn weight_redundancy(&self, args: WeightRedundancy<'_, Self>) -> Result<()> {
        redundancy::weight_redundancy(args)
    }
    fn decode(&self, args: Decode<'_, Self>) -> Result<()> {
        decode::decode(args)
    }
    fn decode_backward(&self, args: DecodeBackward<'_, Self>) -> Result<()> {
        decode::decode_backward(args)
    }
    fn sgd(&self, args: Sgd<'_, Self>) -> Result<()> {
        optimizer::sgd(args)
    }
    fn adam(&self, args: Adam<'_, Self>) -> Result<()> {
        optimizer::adam(args)
    }
}

/// f(z); written so that NaN stays NaN.
fn activate(activation: Activation, z: f64) -> f64 {
    match activation {
        Activation::Relu => {
            if z < 0.0 {
                0.0
            } else {
                z
            }
        }
        Activation::Identity => z,
        // The second term is NaN for NaN, which the first is not.
        Activation::Softplus => z.max(0.0) + (-z.abs()).exp().ln_1p(),
    }
}

/// f'(z), from a = f(z).
fn derivative(activation: Activation, a: f64) -> f64 {
    match activation {
        Activation::Relu => f64::from(u8::from(!matches!(a.partial_cmp(&0.0), Some(o) if o.is_le()))),
        Activation::Identity => 1.0,
        Activation::Softplus => -(-a).exp_m1(),
    }
}

/// Σ_k left(k)·right(k).
fn dot(len: usize, left: impl Fn(usize) -> f64, right: impl Fn(usize) -> f64) -> f64 {
    (0..len).map(|k| left(k) * right(k)).sum()
}
