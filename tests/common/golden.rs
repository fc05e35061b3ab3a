//! Golden vectors: inputs in `f32`, everything else in `f64`, computed by an independent implementation of the published objective.

use super::step::Problem;
use sae_kernels::{Activation, Objective, Reduction, Shape};
use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Directories of golden files, besides the project's own, separated by `:`.
const VARIABLE: &str = "SAE_KERNELS_GOLDEN_DIR";

/// One file of golden vectors.
pub struct Golden {
    pub name: String,
    pub problem: Problem,
    /// Whether the file is the project's own.
    pub own: bool,
    tensors: HashMap<String, Vec<f64>>,
}

impl Golden {
    /// Every file of every directory.
    pub fn all() -> Vec<Self> {
        // Where the program was built, unless it was carried elsewhere.
        let root = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let own = Path::new(&root).join("tests/golden");
        let more = std::env::var_os(VARIABLE).unwrap_or_default();
        let directories =
            std::iter::once(own.clone()).chain(std::env::split_paths(&more).filter(|d| !d.as_os_str().is_empty()));
        let mut files: Vec<PathBuf> = Vec::new();
        for directory in directories {
            let found = files.len();
            let entries = std::fs::read_dir(&directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
            files.extend(
                entries.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "safetensors")),
            );
            assert!(files.len() > found, "no golden files in {}", directory.display());
        }
        files.sort();
        files.iter().map(|file| Self { own: file.starts_with(&own), ..Self::read(file) }).collect()
    }

    fn read(file: &Path) -> Self {
        let name = file.display().to_string();
        let bytes = std::fs::read(file).unwrap_or_else(|e| panic!("{name}: {e}"));
        let tensors = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
        let shape_of =
            |tensor: &str| tensors.tensor(tensor).unwrap_or_else(|e| panic!("{name}: {tensor}: {e}")).shape().to_vec();
        let (x_shape, weight_shape) = (shape_of("x"), shape_of("weight"));
        let shape = Shape { rows: x_shape[0], inputs: x_shape[1], latents: weight_shape[0] };
        let values: HashMap<String, Vec<f64>> =
            tensors.iter().map(|(tensor, view)| (tensor.to_string(), widen(view.dtype(), view.data()))).collect();
        let setting = settings(file, &bytes);
        let number = |key: &str| -> f64 {
            setting(key).and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("{name}: no number {key}"))
        };
        let objective = Objective {
            lambda_lse: number("lambda_lse"),
            lambda_var: number("lambda_var"),
            lambda_tc: number("lambda_tc"),
            lambda_wr: number("lambda_wr"),
            variance_eps: number("variance_eps"),
            reduction: match setting("reduction").as_deref() {
                Some("sum") => Reduction::Sum,
                Some("mean") => Reduction::Mean,
                other => panic!("{name}: reduction {other:?}"),
            },
            normalize_weight: true,
        };
        let input = |tensor: &str| values[tensor].clone();
        let problem = Problem {
            shape,
            x: input("x"),
            weight: input("weight"),
            bias: input("bias"),
            objective,
            activation: Activation::Relu,
        };
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        Self { name, problem, own: true, tensors: values }
    }

    pub fn tensor(&self, name: &str) -> &[f64] {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no tensor {name}", self.name))
    }
}

/// The configuration: the file's own metadata, or what `index.json` beside it says.
fn settings(file: &Path, bytes: &[u8]) -> impl Fn(&str) -> Option<String> {
    let (_, header) = SafeTensors::read_metadata(bytes).unwrap();
    let own = header.metadata().clone().unwrap_or_default();
    let index = std::fs::read_to_string(file.with_file_name("index.json")).unwrap_or_default();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap_or_default();
    let entry = index[file.file_stem().unwrap().to_string_lossy().as_ref()].clone();
    move |key| {
        own.get(key).cloned().or_else(|| match &entry[key] {
            serde_json::Value::Null => None,
            serde_json::Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        })
    }
}

fn widen(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
    match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect(),
        Dtype::F64 => bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
        other => panic!("golden tensors are f32 or f64, not {other:?}"),
    }
}
