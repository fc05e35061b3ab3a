//! [`Decode`] and [`DecodeBackward`]: the standard sparse autoencoder's decoder.

use super::backward::GradientEpilogue;
use super::gemm::{Cut, Epilogue, Gemm, Group, Tile, workspace_len as gemm_len};
use super::memory::{Out, Scratch};
use super::pack::Operand;
use super::rows;
use super::simd::{Isa, Simd, TILE_VECTORS};
use super::{Core, Cpu, CpuElement};
use crate::error::Result;
use crate::matrix::MatRef;
use crate::operations::{Decode, DecodeBackward};

pub(super) fn workspace_len(core: &Core, n: usize, d: usize, h: usize) -> usize {
    Cut::most_row_groups(core.isa, n) * Cut::cols(core.isa, d).groups() + gemm_len(core, n, d, h)
}

pub(super) fn backward_workspace_len(core: &Core, n: usize, d: usize, h: usize) -> usize {
    Cut::most_row_groups(core.isa, n) * h + gemm_len(core, n, h, d)
}

fn error_slots_len(isa: Isa, n: usize, d: usize) -> usize {
    Cut::rows(isa, n, d).groups() * Cut::cols(isa, d).groups()
}

pub(super) fn decode<E: CpuElement>(core: &Core, mut args: Decode<'_, Cpu<E>>) -> Result<()> {
    let (n, d, h) = args.check()?;
    let (slots_len, gemm) = (error_slots_len(core.isa, n, d), gemm_len(core, n, d, h));
    let mut scratch = Scratch::new(args.workspace, slots_len + gemm)?;
    let slots = scratch.f64(slots_len);
    let epilogue = DecodeEpilogue {
        bias: args.bias,
        x: args.x,
        reconstruction: args.reconstruction.as_mut().map(Out::new),
        residual_weight: args.residual_weight as f32,
        residual: args.residual.as_mut().map(Out::new),
        slots: Out::dense(&mut *slots, Cut::cols(core.isa, d).groups()),
    };
    Gemm::new(Operand::rows(args.activations), Operand::cols(args.weight)).run(core, scratch.f64(gemm), &epilogue);
    let before = if args.accumulate { args.squared_error[0] } else { 0.0 };
    args.squared_error[0] = before + slots.iter().sum::<f64>();
    Ok(())
}

struct DecodeEpilogue<'a, E: CpuElement> {
    bias: &'a [f32],
    x: MatRef<'a, E>,
    reconstruction: Option<Out<'a, f32>>,
    residual_weight: f32,
    residual: Option<Out<'a, E>>,
    slots: Out<'a, f64>,
}

impl<E: CpuElement> Epilogue for DecodeEpilogue<'_, E> {
    /// Σ (x̂ − x)².
    type State = f64;

    fn begin(&self, _: &Group) -> f64 {
        0.0
    }

    #[inline(always)]
    fn tile<S: Simd>(&self, s: S, state: &mut f64, _: &Group, tile: Tile<'_>) {
        let bias = rows::load(s, &self.bias[tile.cols.clone()]);
        let mut squares = s.splat(0.0);
        for (i, row) in tile.rows.clone().enumerate() {
            let product = rows::load(s, tile.row(i));
            let x = rows::widen(s, &self.x.row(row)[tile.cols.clone()]);
            let reconstruction = [s.add(product[0], bias[0]), s.add(product[1], bias[1])];
            if let Some(out) = &self.reconstruction {
                // SAFETY: this tile's part of the row.
                rows::store(s, unsafe { out.part(row, tile.cols.clone()) }, reconstruction);
            }
            let mut residual = reconstruction;
            for v in 0..TILE_VECTORS {
                let error = s.sub(reconstruction[v], x[v]);
                let counted = s.first_lanes(tile.cols.len().saturating_sub(v * S::LANES), error, s.splat(0.0));
                squares = s.fma(counted, counted, squares);
                residual[v] = s.mul(error, s.splat(self.residual_weight));
            }
            if let Some(out) = &self.residual {
                // SAFETY: this tile's part of the row.
                rows::narrow::<S, E>(s, unsafe { out.part(row, tile.cols.clone()) }, residual);
            }
        }
        *state += f64::from(s.horizontal_sum(squares));
    }

    fn end(&self, state: &f64, group: &Group) {
        // SAFETY: this group's slot.
        unsafe { self.slots.set(group.row_index, group.col_index, *state) };
    }
}

pub(super) fn decode_backward<E: CpuElement>(core: &Core, mut args: DecodeBackward<'_, Cpu<E>>) -> Result<()> {
    let (n, d, h) = args.check()?;
    let (slots_len, gemm) = (Cut::rows(core.isa, n, h).groups() * h, gemm_len(core, n, h, d));
    let mut scratch = Scratch::new(args.workspace, slots_len + gemm)?;
    let slots = scratch.f64(slots_len);
    let epilogue = GradientEpilogue {
        activations: args.activations,
        activation: args.activation,
        lse: None,
        statistics: None,
        offset: None,
        l1: args.l1 as f32,
        dz: Out::new(&mut args.dz),
        slots: Out::dense(&mut *slots, h),
    };
    Gemm::new(Operand::rows(args.residual), Operand::rows(args.weight)).run(core, scratch.f64(gemm), &epilogue);
    rows::fold_f32(slots, args.accumulate, args.grad_bias);
    Ok(())
}
