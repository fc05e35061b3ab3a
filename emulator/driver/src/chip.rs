//! The GPU that this is: its compute capability and multiprocessors, from the environment.

use cudarc::driver::sys::CUdevice_attribute_enum::{self as Attribute, *};

/// What the environment asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chip {
    pub capability: (i32, i32),
    pub multiprocessors: u32,
    pub check_races: bool,
}

/// Of the device's memory: what a machine that emulates it has to spare.
pub(crate) const MEMORY: usize = 4 << 30;

impl Chip {
    /// From `PTX_EMULATOR_*`, or what is wrong there.
    pub(crate) fn from_environment() -> Result<Chip, String> {
        let variable = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_string());
        let wanted = variable("PTX_EMULATOR_CAPABILITY", "8.0");
        let capability =
            wanted.split_once('.').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        let capability = capability.filter(|capability| *capability >= (8, 0));
        let capability =
            capability.ok_or(format!("PTX_EMULATOR_CAPABILITY={wanted} is not a compute capability from 8.0 on"))?;
        let wanted = variable("PTX_EMULATOR_MULTIPROCESSORS", "2");
        let multiprocessors = wanted.parse().ok().filter(|n| (1..=1024).contains(n));
        let multiprocessors =
            multiprocessors.ok_or(format!("PTX_EMULATOR_MULTIPROCESSORS={wanted} is not a number from 1 to 1024"))?;
        let check_races = variable("PTX_EMULATOR_CHECK_RACES", "1") != "0";
        Ok(Chip { capability, multiprocessors, check_races })
    }

    pub(crate) fn name(self) -> String {
        let (major, minor) = self.capability;
        format!("PTX emulator, {major}.{minor}")
    }

    /// Shared memory of a multiprocessor. A block has at most 1 KiB less.
    pub(crate) fn shared_per_multiprocessor(self) -> u32 {
        match self.capability {
            (8, 0 | 7) => 164 << 10,
            (8, _) | (12, _) => 100 << 10,
            _ => 228 << 10,
        }
    }

    pub(crate) fn shared_limit(self) -> u32 {
        self.shared_per_multiprocessor() - (1 << 10)
    }

    pub(crate) fn threads_per_multiprocessor(self) -> u32 {
        if matches!(self.capability, (8, 0) | (9 | 10, _)) { 2048 } else { 1536 }
    }

    /// Whether PTX for this target can be compiled for the chip: `sm_80` for all that are not older, `sm_90a` for its own chip.
    pub(crate) fn runs(self, target: &str) -> bool {
        let digits = target.trim_start_matches("sm_");
        let number = digits.trim_end_matches(|c: char| c.is_ascii_lowercase());
        let Ok(number) = number.parse::<i32>() else { return false };
        let wanted = (number / 10, number % 10);
        if digits.ends_with('a') {
            wanted == self.capability
        } else if digits.ends_with('f') {
            wanted.0 == self.capability.0 && wanted <= self.capability
        } else {
            wanted <= self.capability
        }
    }

    /// An attribute of the device; 0 for what it does not have.
    pub(crate) fn attribute(self, attribute: u32) -> i32 {
        const { assert!(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK as u32 == 1) };
        let (major, minor) = self.capability;
        let table: [(Attribute, i32); 32] = [
            (CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024),
            (CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024),
            (CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, 1024),
            (CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, 64),
            (CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, i32::MAX),
            (CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, 65535),
            (CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, 65535),
            (CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 48 << 10),
            (CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY, 64 << 10),
            (CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32),
            (CU_DEVICE_ATTRIBUTE_MAX_PITCH, i32::MAX),
            (CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 64 << 10),
            (CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1_000_000),
            (CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, self.multiprocessors as i32),
            (CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS, 1),
            (CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 1_000_000),
            (CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 64),
            (CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 1 << 20),
            (CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, self.threads_per_multiprocessor() as i32),
            (CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1),
            (CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, major),
            (CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, minor),
            (CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, self.shared_per_multiprocessor() as i32),
            (CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR, 64 << 10),
            (CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH, 1),
            (CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, self.shared_limit() as i32),
            (CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR, 32),
            (CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK, 1 << 10),
            (CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, 1),
            (CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH, i32::from(major >= 9)),
            (CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED, i32::from(major >= 9)),
            (CU_DEVICE_ATTRIBUTE_SURFACE_ALIGNMENT, 512),
        ];
        table.into_iter().find(|(name, _)| *name as u32 == attribute).map_or(0, |(_, value)| value)
    }
}
