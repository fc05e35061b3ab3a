//! Data files, whole and broken: every fault is an error that names the file and the reason.

#[path = "../examples/common/mod.rs"]
mod common;

use common::data::{DataError, Dataset, Fault, default_directory, load};
use flate2::Compression;
use flate2::write::GzEncoder;
use half::{bf16, f16};
use npyz::WriterBuilder;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// An idx file: magic number, extents, bytes.
fn idx(magic: u32, extents: &[u32], bytes: &[u8]) -> Vec<u8> {
    let mut file = magic.to_be_bytes().to_vec();
    extents.iter().for_each(|extent| file.extend(extent.to_be_bytes()));
    file.extend(bytes);
    file
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// `count` images of 2×3 pixels: image i has pixels 6i, 6i + 1, …
fn images(count: u8) -> Vec<u8> {
    let pixels: Vec<u8> = (0..6 * count).collect();
    idx(0x803, &[count.into(), 2, 3], &pixels)
}

/// Labels 0, 1, 2, 0, …
fn labels(count: u8) -> Vec<u8> {
    idx(0x801, &[count.into()], &(0..count).map(|i| i % 3).collect::<Vec<_>>())
}

/// A directory with all four files, well formed: 4 training and 3 test images.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    put(&folder, "train-images-idx3-ubyte", &images(4));
    put(&folder, "train-labels-idx1-ubyte", &labels(4));
    put(&folder, "t10k-images-idx3-ubyte.gz", &gzip(&images(3)));
    put(&folder, "t10k-labels-idx1-ubyte.gz", &gzip(&labels(3)));
    folder
}

fn put(folder: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// The error of loading `path`, which must name `file` and have `words` in its text.
fn fault(path: &Path, file: &Path, words: &[&str]) -> Fault {
    let DataError { path: named, fault } = load(path).expect_err("the file is broken");
    assert_eq!(named, file);
    let text = DataError { path: named, fault: clone(&fault) }.to_string();
    assert!(text.contains(&*file.to_string_lossy()), "{text}");
    for word in words {
        assert!(text.contains(word), "{text:?} lacks {word:?}");
    }
    fault
}

/// The same text again; [`Fault`] cannot be cloned because of the errors within.
fn clone(fault: &Fault) -> Fault {
    Fault::Format { format: "test", reason: fault.to_string() }
}

#[test]
fn four_files_plain_and_gzipped() {
    let Dataset { inputs, image, train, test, .. } = load(folder().path()).unwrap();
    assert_eq!((inputs, image), (6, Some((2, 3))));
    assert_eq!((train.rows, test.rows), (4, 3));
    assert_eq!(train.x, (0..24).map(|p| p as f32 / 255.0).collect::<Vec<_>>());
    assert_eq!(train.labels.unwrap(), [0, 1, 2, 0]);
    assert_eq!(test.labels.unwrap(), [0, 1, 2]);
}

#[test]
fn shipped_data_is_split() {
    let Dataset { inputs, train, test, .. } = load(&default_directory()).unwrap();
    assert_eq!((inputs, train.rows, test.rows), (784, 8_000, 2_000));
    assert_eq!((train.x.len(), test.x.len()), (8_000 * 784, 2_000 * 784));
    // The published counts of the ten digits among the 10 000, so no image was lost or taken twice.
    let mut counts = [0; 10];
    train.labels.unwrap().iter().chain(&test.labels.unwrap()).for_each(|label| counts[usize::from(*label)] += 1);
    assert_eq!(counts, [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]);
    assert!(train.x.iter().all(|p| (0.0..=1.0).contains(p)));
}

#[test]
fn split_keeps_rows_with_their_labels() {
    let folder = tempfile::tempdir().unwrap();
    put(&folder, "t10k-images-idx3-ubyte", &images(40));
    put(&folder, "t10k-labels-idx1-ubyte", &labels(40));
    let Dataset { train, test, .. } = load(folder.path()).unwrap();
    assert_eq!((train.rows, test.rows), (32, 8));
    let mut seen = Vec::new();
    for part in [&train, &test] {
        for (row, label) in part.x.chunks(6).zip(part.labels.as_ref().unwrap()) {
            let image = (row[0] * 255.0).round() as u8 / 6;
            assert_eq!(*label, image % 3);
            seen.push(image);
        }
    }
    seen.sort();
    assert_eq!(seen, (0..40).collect::<Vec<_>>());
    assert_eq!(load(folder.path()).unwrap().test.x, test.x, "the split is the same each time");
}

#[test]
fn missing_files() {
    let nowhere = Path::new("/no/such/directory");
    assert!(matches!(fault(nowhere, nowhere, &["no such file"]), Fault::Missing));

    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(fault(empty.path(), empty.path(), &["train-images-idx3-ubyte"]), Fault::NoImages));

    let folder = folder();
    let labels = folder.path().join("train-labels-idx1-ubyte");
    fs::remove_file(&labels).unwrap();
    assert!(matches!(fault(folder.path(), &labels, &["no such file"]), Fault::Missing));

    let text = put(&folder, "data.csv", b"1,2,3");
    assert!(matches!(fault(&text, &text, &[".npy", ".safetensors"]), Fault::UnknownKind));
}

#[test]
fn truncated_and_damaged_gzip() {
    let folder = folder();
    let whole = gzip(&images(3));
    let path = put(&folder, "t10k-images-idx3-ubyte.gz", &whole[..whole.len() - 9]);
    assert!(matches!(fault(folder.path(), &path, &["gzip", "truncated"]), Fault::Gzip(_)));
    // The trailer alone cut off: all the pixels are there, but unchecked.
    put(&folder, "t10k-images-idx3-ubyte.gz", &whole[..whole.len() - 4]);
    assert!(matches!(fault(folder.path(), &path, &["gzip"]), Fault::Gzip(_)));
    // A wrong checksum.
    let mut damaged = whole.clone();
    let checksum = damaged.len() - 8;
    damaged[checksum] ^= 1;
    put(&folder, "t10k-images-idx3-ubyte.gz", &damaged);
    assert!(matches!(fault(folder.path(), &path, &["gzip"]), Fault::Gzip(_)));
    // Not gzip at all.
    put(&folder, "t10k-images-idx3-ubyte.gz", &images(3));
    assert!(matches!(fault(folder.path(), &path, &["gzip"]), Fault::Gzip(_)));
}

#[test]
fn wrong_magic_number() {
    let folder = folder();
    // Labels where images should be, as happens when files are mixed up.
    let path = put(&folder, "train-images-idx3-ubyte", &labels(4));
    let found = fault(folder.path(), &path, &["0x00000801", "0x00000803", "images"]);
    assert!(matches!(found, Fault::Magic { found: 0x801, expected: 0x803, .. }));
    put(&folder, "train-images-idx3-ubyte", &images(4));
    let path = put(&folder, "train-labels-idx1-ubyte", &images(4));
    assert!(matches!(fault(folder.path(), &path, &["labels"]), Fault::Magic { found: 0x803, expected: 0x801, .. }));
}

#[test]
fn wrong_length() {
    let folder = folder();
    let mut short = images(4);
    short.pop();
    let path = put(&folder, "train-images-idx3-ubyte", &short);
    assert!(matches!(fault(folder.path(), &path, &["24", "23"]), Fault::TooShort { expected: 24, found: 23 }));

    let mut long = images(4);
    long.push(0);
    put(&folder, "train-images-idx3-ubyte", &long);
    assert!(matches!(fault(folder.path(), &path, &["24", "more"]), Fault::TooLong { expected: 24 }));

    for len in [0, 3, 15] {
        put(&folder, "train-images-idx3-ubyte", &images(4)[..len]);
        assert!(
            matches!(fault(folder.path(), &path, &["header"]), Fault::NoHeader { expected: 16, .. }),
            "{len} bytes"
        );
    }

    // Extents whose product passes the address space, or is far more than there is.
    put(&folder, "train-images-idx3-ubyte", &idx(0x803, &[u32::MAX; 3], &[]));
    assert!(matches!(fault(folder.path(), &path, &["more data"]), Fault::TooLarge));
    put(&folder, "train-images-idx3-ubyte", &idx(0x803, &[u32::MAX, 1000, 1000], &[1]));
    assert!(matches!(fault(folder.path(), &path, &["truncated"]), Fault::TooShort { found: 1, .. }));
}

#[test]
fn images_and_labels_that_do_not_belong_together() {
    let folder = folder();
    let path = put(&folder, "train-labels-idx1-ubyte", &labels(5));
    let found = fault(folder.path(), &path, &["5 labels", "train-images-idx3-ubyte has 4 images"]);
    assert!(matches!(found, Fault::LabelCount { labels: 5, images: 4, .. }));
    put(&folder, "train-labels-idx1-ubyte", &labels(4));

    let path = put(&folder, "t10k-images-idx3-ubyte.gz", &gzip(&idx(0x803, &[3, 2, 2], &[0; 12])));
    assert!(matches!(fault(folder.path(), &path, &["4", "6"]), Fault::ImageSize { expected: 6, found: 4 }));
}

#[test]
fn empty_images() {
    let folder = folder();
    let path = put(&folder, "train-images-idx3-ubyte", &idx(0x803, &[0, 2, 3], &[]));
    assert!(matches!(fault(folder.path(), &path, &["empty"]), Fault::Empty { rows: 0, cols: 6 }));
    put(&folder, "train-images-idx3-ubyte", &idx(0x803, &[4, 0, 3], &[]));
    assert!(matches!(fault(folder.path(), &path, &["empty"]), Fault::Empty { rows: 4, cols: 0 }));
}

/// A `.npy` file of that shape, in C order.
fn npy<T: npyz::AutoSerialize + Copy>(shape: &[u64], order: npyz::Order, values: &[T]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let options = npyz::WriteOptions::new().default_dtype().shape(shape).order(order).writer(&mut bytes);
    let mut writer = options.begin_nd().unwrap();
    writer.extend(values.iter().copied()).unwrap();
    writer.finish().unwrap();
    bytes
}

/// 20 rows of 3 numbers: row i is 3i, 3i + 1, 3i + 2.
fn matrix() -> Vec<f32> {
    (0..60).map(|v| v as f32).collect()
}

/// Loads `path` and checks that it holds [`matrix`], split 16 to 4.
fn holds_matrix(path: &Path) {
    let Dataset { inputs, image, train, test, .. } = load(path).unwrap();
    assert_eq!((inputs, image, train.rows, test.rows), (3, None, 16, 4));
    assert!(train.labels.is_none() && test.labels.is_none());
    let mut rows: Vec<&[f32]> = train.x.chunks(3).chain(test.x.chunks(3)).collect();
    rows.sort_by(|l, r| l.partial_cmp(r).unwrap());
    assert_eq!(rows.concat(), matrix());
}

#[test]
fn npy_of_every_width_and_order() {
    let folder = tempfile::tempdir().unwrap();
    let (c, f) = (npyz::Order::C, npyz::Order::Fortran);
    let f16s: Vec<f16> = matrix().into_iter().map(f16::from_f32).collect();
    let f64s: Vec<f64> = matrix().into_iter().map(f64::from).collect();
    let transposed: Vec<f32> = (0..60).map(|at| matrix()[at % 20 * 3 + at / 20]).collect();
    holds_matrix(&put(&folder, "f16.npy", &npy(&[20, 3], c, &f16s)));
    holds_matrix(&put(&folder, "f32.npy", &npy(&[20, 3], c, &matrix())));
    holds_matrix(&put(&folder, "f64.npy", &npy(&[20, 3], c, &f64s)));
    holds_matrix(&put(&folder, "fortran.npy", &npy(&[20, 3], f, &transposed)));
}

#[test]
fn npy_faults() {
    let folder = tempfile::tempdir().unwrap();
    let c = npyz::Order::C;
    let path = put(&folder, "x.npy", &npy(&[20, 3], c, &vec![1i32; 60]));
    assert!(matches!(fault(&path, &path, &["i4", "float32"]), Fault::ElementType { .. }));
    put(&folder, "x.npy", &npy(&[60], c, &matrix()));
    assert!(matches!(fault(&path, &path, &["[60]"]), Fault::Rank { .. }));
    put(&folder, "x.npy", &npy(&[0, 3], c, &[0f32; 0]));
    assert!(matches!(fault(&path, &path, &["empty"]), Fault::Empty { rows: 0, cols: 3 }));
    put(&folder, "x.npy", &npy(&[3, 20], c, &matrix()));
    assert!(matches!(fault(&path, &path, &["3 row"]), Fault::TooFewRows { rows: 3, needed: 10 }));

    let whole = npy(&[20, 3], c, &matrix());
    put(&folder, "x.npy", &whole[..whole.len() - 1]);
    assert!(matches!(fault(&path, &path, &["240", "239"]), Fault::TooShort { expected: 240, found: 239 }));
    put(&folder, "x.npy", &[&whole[..], &[0]].concat());
    assert!(matches!(fault(&path, &path, &["240", "more"]), Fault::TooLong { expected: 240 }));
    put(&folder, "x.npy", b"not numpy's");
    assert!(matches!(fault(&path, &path, &["npy"]), Fault::Format { .. }));

    let mut values: Vec<f64> = matrix().into_iter().map(f64::from).collect();
    for (bad, shown) in [(f64::NAN, "NaN"), (f64::INFINITY, "inf"), (1e300, "1000")] {
        values[3 * 7 + 2] = bad;
        put(&folder, "x.npy", &npy(&[20, 3], c, &values));
        let found = fault(&path, &path, &["row 7, column 2", shown]);
        assert!(matches!(found, Fault::NotFinite { row: 7, col: 2, .. }));
    }
}

/// A `.safetensors` file of those tensors.
fn tensors(tensors: &[(&str, Dtype, &[usize], &[u8])]) -> Vec<u8> {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name.to_string(), TensorView::new(*dtype, shape.to_vec(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

#[test]
fn safetensors_of_every_type() {
    let folder = tempfile::tempdir().unwrap();
    let bytes: [(Dtype, Vec<u8>); 4] = [
        (Dtype::F64, matrix().iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect()),
        (Dtype::F32, f32_bytes(&matrix())),
        (Dtype::F16, matrix().iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()),
        (Dtype::BF16, matrix().iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()),
    ];
    for (dtype, bytes) in &bytes {
        holds_matrix(&put(&folder, "x.safetensors", &tensors(&[("x", *dtype, &[20, 3], bytes)])));
    }
    // The matrix among others.
    let vector = f32_bytes(&[1.0; 5]);
    let file = tensors(&[("a", Dtype::F32, &[5], &vector), ("x", Dtype::F32, &[20, 3], &f32_bytes(&matrix()))]);
    holds_matrix(&put(&folder, "x.safetensors", &file));
}

#[test]
fn safetensors_faults() {
    let folder = tempfile::tempdir().unwrap();
    let (data, short) = (f32_bytes(&matrix()), f32_bytes(&[1.0; 5]));
    let path = put(&folder, "x.safetensors", &tensors(&[("x", Dtype::I32, &[20, 3], &data)]));
    assert!(matches!(fault(&path, &path, &["I32", "BF16"]), Fault::ElementType { .. }));
    put(&folder, "x.safetensors", &tensors(&[("x", Dtype::F32, &[5, 4, 3], &data)]));
    assert!(matches!(fault(&path, &path, &["[5, 4, 3]"]), Fault::Rank { .. }));
    put(&folder, "x.safetensors", &tensors(&[("a", Dtype::F32, &[5], &short), ("b", Dtype::F32, &[60], &data)]));
    assert!(matches!(fault(&path, &path, &["2 tensors"]), Fault::NoMatrix { count: 2 }));
    put(&folder, "x.safetensors", &tensors(&[("x", Dtype::F32, &[0, 3], &[])]));
    assert!(matches!(fault(&path, &path, &["empty"]), Fault::Empty { rows: 0, cols: 3 }));

    let mut values = matrix();
    values[3 * 4 + 1] = f32::NEG_INFINITY;
    put(&folder, "x.safetensors", &tensors(&[("x", Dtype::F32, &[20, 3], &f32_bytes(&values))]));
    assert!(matches!(fault(&path, &path, &["-inf"]), Fault::NotFinite { row: 4, col: 1, .. }));

    let whole = tensors(&[("x", Dtype::F32, &[20, 3], &data)]);
    for broken in [&whole[..whole.len() - 1], &whole[..4], &[&whole[..], &[0]].concat()] {
        put(&folder, "x.safetensors", broken);
        assert!(matches!(fault(&path, &path, &["safetensors"]), Fault::Format { .. }));
    }
}
