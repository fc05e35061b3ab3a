//! The main job on 1, 2 and 4 ranks: the same training, and the same bits on all ranks; and what the README says of it.

mod common;

use common::{distributed, mpirun, relative};
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// What a rank left: weight, bias and losses.
type Left = HashMap<String, Vec<f64>>;

/// Trains, and reads what each rank left.
fn train(ranks: usize, args: &[&str]) -> Vec<Left> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let ended = mpirun(ranks, &distributed(), [args, &["--out", out]].concat());
    assert!(ended.status.success(), "{ended:?}");
    let read = |rank: usize| {
        let bytes = std::fs::read(folder.path().join(format!("rank-{rank}.safetensors"))).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let values = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
        tensors.iter().map(|(name, tensor)| (name.to_owned(), values(tensor.data()))).collect()
    };
    (0..ranks).map(read).collect()
}

fn assert_same_bits(all: &[Left]) {
    for (rank, left) in all.iter().enumerate() {
        for (name, values) in left {
            let same = values.iter().zip(&all[0][name]).all(|(l, r)| l.to_bits() == r.to_bits());
            assert!(same && values.len() == all[0][name].len(), "{name} of rank {rank} is not that of rank 0");
        }
    }
}

/// A hundred steps, past the end of an epoch, whose last batch is shorter: ranks that had rows have none there.
#[test]
fn hundred_steps_have_the_same_bits_on_all_ranks() {
    for (ranks, shards) in [(2, "100,28"), (4, "100,0,27,1")] {
        let all = train(ranks, &["--shards", shards]);
        assert_eq!((all[0]["weight"].len(), all[0]["losses"].len()), (64 * 784, 100 * 5));
        let total = |step: usize| all[0]["losses"][5 * step + 4];
        assert!(total(99) < total(0) && total(99).is_finite(), "from {} to {}", total(0), total(99));
        assert_same_bits(&all);
    }
}

/// In f32 roundings grow from step to step, and Adam divides gradients by their own size: so training is compared in f64, and f32 by the first
/// step's losses.
#[test]
fn training_is_that_of_one_rank() {
    let small = ["--float64", "--latents", "12", "--batch", "100", "--steps", "40"];
    let one = &train(1, &small)[0];
    assert!(one["losses"][5 * 39 + 4] < one["losses"][4]);
    for (ranks, shards) in [(2, "100,0"), (2, "23,77"), (4, "0,50,1,49")] {
        let all = train(ranks, &[&small[..], &["--shards", shards]].concat());
        for name in ["losses", "weight", "bias"] {
            let error = relative(&all[0][name], &one[name]);
            assert!(error < 1e-9, "{shards}: {name} is off by {error:e}");
        }
        assert_same_bits(&all);
    }
    let one = &train(1, &["--steps", "1"])[0]["losses"];
    for ranks in [2, 4] {
        let error = relative(&train(ranks, &["--steps", "1"])[0]["losses"], one);
        assert!(error < 1e-6, "losses are off by {error:e}");
    }
}

#[test]
fn wrong_options_end_with_the_reason() {
    for (args, reason) in [
        (["--shards", "1,2,125"], "--shards has 3 numbers, but there are 2 ranks"),
        (["--shards", "1,2"], "must add up to --batch, 128"),
        (["--batch", "1"], "at least 2 rows"),
        (["--data", "/nowhere"], "/nowhere: no such file or directory"),
    ] {
        let ended = mpirun(2, &distributed(), args);
        assert!(!ended.status.success() && ended.stderr.contains(reason), "{ended:?}");
    }
}

/// The README's command line runs, and its lines of Rust are those of the program that it runs.
#[test]
fn readme() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let text =
        |path: PathBuf| std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let readme = text(root.join("README.md"));
    let section = readme.split("\n## ").find(|section| section.starts_with("Use it from MPI\n")).unwrap();
    let block = |language: &str| {
        let start = format!("```{language}\n");
        section.split_once(&start).unwrap().1.split_once("```").unwrap().0
    };

    let lines = |text: &str| text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n");
    let program = lines(&text(root.join("integrations/mpi/examples/distributed.rs")));
    let shown = lines(block("rust,ignore"));
    assert!(shown.contains("sae_kernels_mpi::step(") && program.contains(&shown), "the program does not say\n{shown}");

    let command = block("sh").lines().find_map(|line| line.split('#').next()?.strip_prefix("mpirun -n ")).unwrap();
    let mut words = command.split_whitespace();
    let ranks = words.next().unwrap().parse().unwrap();
    assert_eq!(words.next(), Some("target/release/examples/distributed"));
    let ended = mpirun(ranks, &distributed(), words);
    assert!(ended.status.success() && ended.stdout.contains("step 100: "), "{ended:?}");
    assert!(ended.stdout.contains(&format!("on {ranks} ranks")), "{ended:?}");
}
