//! The kernels: which there are, and their compiled images, embedded by `build.rs`.

use super::driver::Mainloop;

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The kernels of each `kernels/*.cu`: those that there is one of, and those that there is one of for each storage type.
macro_rules! families {
    ($($family:ident { $($single:ident)* ; $($typed:ident)* })*) => {
        /// Names of the kernels of one storage type.
        pub struct Kernels { $($(pub(super) $typed: &'static str,)*)* }
        pub(super) const F32: Kernels = Kernels { $($($typed: concat!(stringify!($typed), "_f32"),)*)* };
        pub(super) const BF16: Kernels = Kernels { $($($typed: concat!(stringify!($typed), "_bf16"),)*)* };
        pub(super) const F16: Kernels = Kernels { $($($typed: concat!(stringify!($typed), "_f16"),)*)* };
        /// Every kernel, by the file that it stands in.
        pub const FAMILIES: &[(&str, &[&str])] = &[$((stringify!($family), &[
            $(stringify!($single),)*
            $(concat!(stringify!($typed), "_f32"), concat!(stringify!($typed), "_bf16"), concat!(stringify!($typed), "_f16"),)*
        ]),)*];
    };
}

families! {
    prepare { align_f16; prepare }
    reduce { fold sum; }
    encode { finish_rows; encode responsibilities }
    activations { ; activation_sums }
    statistics { comoments gram_primal variances finish_primal; recentre }
    packed { pack_statistics unpack_statistics; }
    backward { ; backward pointwise }
    dual { gram_nt gram_tn dual_vectors dual_finish; dual_apply }
    product {
        product_nn_bf16 product_nt_bf16 product_tn_bf16 product_nn_f16 product_nt_f16 product_tn_f16;
        column_sums
    }
    redundancy { ; redundancy_primal redundancy_dual row_norms through_norms }
    decode { ; decode decode_backward }
    optimizer { ; sgd adam }
    tiny { ; tiny_step }
}

/// Whether the build made the images of compute capability 9.0.
pub(super) fn has_sm90() -> bool {
    IMAGES.iter().any(|(name, _)| name.ends_with("_sm90"))
}

/// The image of a family: the one with this mainloop where the family has products.
pub(super) fn of(family: &str, mainloop: Mainloop) -> Option<&'static [u8]> {
    let find = |wanted: &str| IMAGES.iter().find(|(name, _)| *name == wanted).map(|(_, image)| *image);
    let sm90 = if mainloop == Mainloop::Sm80 { None } else { find(&format!("{family}_sm90")) };
    sm90.or_else(|| find(family))
}
