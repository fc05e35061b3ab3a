//! How the second mainloop computes a product: the table of ways, and the model that picks one.
//!
//! Clocks of a multiprocessor, counted from what is documented; nothing of it has been measured. A *square* is what a cluster of two blocks
//! computes at a time: two tile rows, one a block, and one or two tile columns.

use super::gemm::{Extents, Region, TILE};

/// How a product is computed under [`Mainloop::Sm90`](super::driver::Mainloop::Sm90).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Schedule {
    /// Squares of 256×256, by both warpgroups together; tensor cores wait for the epilogue.
    Together,
    /// Squares of 256×128, by the two warpgroups in turn: one runs the epilogue while the other multiplies.
    InTurn,
}

/// Blocks of a cluster, each with a tile row of its squares.
pub(super) const CLUSTER: usize = 2;
/// Depth of a stage.
const STAGE_DEPTH: u64 = 64;

/// Multiplications and additions a clock of a multiprocessor's tensor cores, 16-bit.
const TENSOR_RATE: u64 = 2048;
/// Bytes a clock of a multiprocessor's shared memory.
const SHARED_RATE: u64 = 128;
/// Bytes a clock that all multiprocessors get from the L2: 5120 of compute capability 8.0, more is not documented of 9.0.
const L2_RATE: u64 = 5120;
/// Clocks of a tile's epilogue, whether four warps run it or eight: what 3.25 bytes an element take at a multiprocessor's part of 3 TB/s.
const EPILOGUE: u64 = 4096;

impl Schedule {
    /// All, the first to be taken where two take as long.
    pub const ALL: [Self; 2] = [Self::Together, Self::InTurn];

    /// Tile columns of a square.
    const fn tile_cols(self) -> usize {
        match self {
            Self::Together => 2,
            Self::InTurn => 1,
        }
    }

    /// Squares that hold a product.
    pub(super) fn squares(self, extents: &Extents) -> usize {
        let (rows, cols) = (extents.rows.div_ceil(CLUSTER * TILE), extents.cols.div_ceil(self.tile_cols() * TILE));
        match (extents.region, self) {
            (Region::Full, _) => rows * cols,
            (Region::Diagonal, _) => cols,
            (Region::Upper | Region::AboveDiagonal, Self::Together) => cols * (cols + 1) / 2,
            // Columns 2i and 2i + 1 both have i + 1.
            (Region::Upper | Region::AboveDiagonal, Self::InTurn) => (cols / 2 + 1) * cols.div_ceil(2),
        }
    }

    /// Clocks of the products of a stage: what takes longest of the multiplications, the reads and writes of shared memory, and the L2.
    const fn stage(self, multiprocessors: u64) -> u64 {
        let (rows, cols, depth) = (TILE as u64, (self.tile_cols() * TILE) as u64, STAGE_DEPTH);
        let multiply = rows * cols * depth / TENSOR_RATE;
        // A wgmma has 64 rows and a depth of 16, and reads both operands; both operands have been written before.
        let read = rows / 64 * (depth / 16) * (64 + cols) * 16 * 2;
        let shared = (read + (rows + cols) * depth * 2) / SHARED_RATE;
        // The other block copies half of the right operand.
        let l2 = (rows + cols / CLUSTER as u64) * depth * 2 * multiprocessors / L2_RATE;
        let longest = if shared > l2 { shared } else { l2 };
        if multiply > longest { multiply } else { longest }
    }

    /// Clocks of a product of so many pairs of planes.
    fn clocks(self, extents: &Extents, pairs: u32, multiprocessors: u32) -> u64 {
        let clusters = (multiprocessors as u64 / CLUSTER as u64).max(1);
        let waves = (self.squares(extents) as u64).div_ceil(clusters);
        let stages = (extents.depth as u64).div_ceil(STAGE_DEPTH).saturating_mul(pairs.into());
        let products = stages.saturating_mul(self.stage(multiprocessors.into()));
        match self {
            Self::Together => waves.saturating_mul(products.saturating_add(self.tile_cols() as u64 * EPILOGUE)),
            // The first products and the last epilogue are alone; in between the longer of the two counts.
            Self::InTurn if waves > 0 => {
                (waves - 1).saturating_mul(products.max(EPILOGUE)).saturating_add(products).saturating_add(EPILOGUE)
            }
            Self::InTurn => 0,
        }
    }

    /// The one that takes the fewest clocks.
    pub(super) fn of(extents: &Extents, pairs: u32, multiprocessors: u32) -> Self {
        let [first, second] = Self::ALL;
        let clocks = |schedule: Self| schedule.clocks(extents, pairs, multiprocessors);
        if clocks(second) < clocks(first) { second } else { first }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of an H100 SXM.
    const MULTIPROCESSORS: u32 = 132;

    #[test]
    fn rates_of_a_stage() {
        let stage = |schedule: Schedule| schedule.stage(MULTIPROCESSORS.into());
        // The products take 1024 clocks, as do 128 KiB of shared memory; half as wide, 512, and 80 KiB 640.
        assert_eq!(Schedule::ALL.map(stage), [1024, 640]);
        // The L2 would matter to more multiprocessors: 32 KiB and 24 KiB for each.
        assert_eq!(Schedule::ALL.map(|schedule| schedule.stage(200)), [1280, 960]);
    }

    /// Counted tile by tile: a square is needed if any tile of it is wanted.
    #[test]
    fn squares_hold_every_tile() {
        for schedule in Schedule::ALL {
            for tiles in 1..=9 {
                let (rows, cols) = (tiles * TILE - 5, tiles * TILE - 3);
                for region in [Region::Full, Region::Upper, Region::AboveDiagonal, Region::Diagonal] {
                    let extents = Extents { rows, cols, depth: 1, region };
                    let mut wanted = std::collections::BTreeSet::new();
                    for (row, col) in (0..tiles * tiles).map(|at| (at / tiles, at % tiles)) {
                        let is_wanted = match region {
                            Region::Full => true,
                            Region::Diagonal => row == col,
                            Region::Upper | Region::AboveDiagonal => row <= col,
                        };
                        if is_wanted {
                            wanted.insert((row / CLUSTER, col / schedule.tile_cols()));
                        }
                    }
                    assert_eq!(schedule.squares(&extents), wanted.len(), "{schedule:?} {tiles} {region:?}");
                }
            }
        }
    }

    #[test]
    fn few_squares_and_short_sums_are_computed_in_turn() {
        use Schedule::{InTurn, Together};
        let full = Extents::full;
        for (what, extents, pairs, expected) in [
            ("encode, 12 stages: the epilogue is a third", full(8192, 6144, 768), 1, InTurn),
            ("encode in f32, six pairs: 72 stages", full(8192, 6144, 768), 6, Together),
            ("backward, 96 stages", full(8192, 6144, 6144), 1, Together),
            ("statistics, 5 waves of 300 squares, 10 of 600", Extents::symmetric(6144, 8192), 1, Together),
            ("decode, 2 waves of 96 squares, 3 of 192", full(8192, 768, 6144), 1, InTurn),
            ("decode at twice the rows: 3 waves of 192 squares, 6 of 384", full(16384, 768, 6144), 1, Together),
            ("one wave either way, 33 clusters or 66", full(8448, 256, 6144), 1, InTurn),
            ("one wave of 66, or two", full(16896, 256, 6144), 1, Together),
            ("nothing", full(0, 256, 6144), 1, Together),
        ] {
            assert_eq!(Schedule::of(&extents, pairs, MULTIPROCESSORS), expected, "{what}");
        }
    }

    /// Where all clusters are busy either way, 32 stages are the crossover: 2·(640 − 512) clocks a stage against two epilogues.
    #[test]
    fn the_crossover_over_depth() {
        let of = |depth| Schedule::of(&Extents::full(66 * 256 * 100, 256, depth), 1, MULTIPROCESSORS);
        let first = (1..4096).find(|depth| of(*depth) == Schedule::Together);
        assert_eq!(first, Some(31 * 64 + 1));
        assert!((first.unwrap()..8192).step_by(64).all(|depth| of(depth) == Schedule::Together));
    }

    #[test]
    fn any_extents_have_a_schedule() {
        for multiprocessors in [2, 3, 132, u32::MAX] {
            let extents = Extents::full(i32::MAX as usize, i32::MAX as usize, i32::MAX as usize);
            assert_eq!(Schedule::of(&extents, 6, multiprocessors), Schedule::Together);
        }
    }
}
