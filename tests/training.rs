//! The trainer of the examples: exact resumption, and losses that end a training.

#[path = "../examples/common/mod.rs"]
mod common;
#[cfg(sae_kernels_ptx)]
#[path = "common/mod.rs"]
mod testing;

use common::checkpoint::Checkpoint;
use common::data::{Dataset, Part};
use common::device::Storage;
use common::evaluate::evaluate;
use common::trainer::{Model, Optimizer, Settings, Trainer};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use sae_kernels::{Backend, Cpu, Isa, Reference, bf16};

const INPUTS: usize = 6;

fn rows(rows: usize) -> Vec<f32> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(3);
    (0..rows * INPUTS).map(|_| rng.random()).collect()
}

const DECODER_FREE: Model = Model::DecoderFree { lambda_lse: 1.0, lambda_var: 1.0, lambda_tc: 1.0, lambda_wr: 0.5 };
const STANDARD: Model = Model::Standard { lambda_l1: 0.01 };

fn settings(model: Model, optimizer: Optimizer) -> Settings {
    let (inputs, latents, batch, micro_batch, seed) = (INPUTS, 4, 16, None, 5);
    Settings { model, inputs, latents, batch, micro_batch, optimizer, seed, storage: Storage::F64 }
}

const ADAM: Optimizer = Optimizer::Adam { learning_rate: 1e-2 };

fn trained_on<B: Backend + Clone>(backend: B, settings: &Settings, x: &[f32], epochs: usize) -> Trainer<B> {
    let mut trainer = Trainer::new(backend, settings.clone()).unwrap();
    (0..epochs).for_each(|_| trainer.train_epoch(x, |_| ()).unwrap());
    trainer
}

fn trained(settings: &Settings, x: &[f32], epochs: usize) -> Trainer<Reference> {
    trained_on(Reference, settings, x, epochs)
}

/// Trains 4 epochs, and 2 and then 2 more from a file, and compares all that is kept, bit by bit.
fn resumes_exactly<B: Backend + Clone>(backend: B, settings: &Settings) {
    let x = rows(40);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let mut whole = trained_on(backend.clone(), settings, &x, 4).checkpoint().unwrap();
    trained_on(backend.clone(), settings, &x, 2).checkpoint().unwrap().write(&path).unwrap();
    let mut resumed = Trainer::resume(backend, &Checkpoint::read(&path).unwrap()).unwrap();
    (0..2).for_each(|_| resumed.train_epoch(&x, |_| ()).unwrap());
    let mut resumed = resumed.checkpoint().unwrap();
    // The file's order of tensors is its own.
    resumed.tensors.sort_by(|l, r| l.name.cmp(&r.name));
    whole.tensors.sort_by(|l, r| l.name.cmp(&r.name));
    assert_eq!(resumed, whole, "{settings:?}");
}

#[test]
fn resuming_is_exact() {
    let sgd = |momentum| Optimizer::Sgd { learning_rate: 1e-2, momentum };
    for model in [DECODER_FREE, STANDARD] {
        for optimizer in [ADAM, sgd(0.0), sgd(0.9)] {
            let settings = settings(model, optimizer);
            resumes_exactly(Reference, &settings);
            resumes_exactly(Cpu::<f32>::with(Isa::detect(), 1).unwrap(), &settings);
            // Here the products see rounded copies of the parameters, which must be those that the optimiser rounded.
            resumes_exactly(Cpu::<bf16>::with(Isa::detect(), 1).unwrap(), &settings);
        }
    }
}

/// The loss terms of every epoch are those of the reference, within a tolerance relative to their size.
fn trains_like_the_reference<B: Backend + Clone>(backend: B, model: Model, tolerance: f64) {
    let x = rows(64);
    let settings = settings(model, ADAM);
    let (expected, found) = (trained(&settings, &x, 5), trained_on(backend, &settings, &x, 5));
    for (expected, found) in expected.history().iter().zip(found.history()) {
        for (term, (expected, found)) in expected.iter().zip(found).enumerate() {
            let size = expected.abs().max(0.1);
            assert!((found - expected).abs() < tolerance * size, "{model:?} term {term}: {found} is not {expected}");
        }
    }
}

#[test]
fn backends_train_alike() {
    for model in [DECODER_FREE, STANDARD] {
        trains_like_the_reference(Cpu::<f32>::new().unwrap(), model, 1e-4);
        trains_like_the_reference(Cpu::<bf16>::new().unwrap(), model, 0.05);
    }
}

/// The job of `--device cuda`, on an emulated GPU.
#[cfg(sae_kernels_ptx)]
#[test]
fn cuda_trains_alike() {
    use testing::emulated::cuda;
    let options = ptx_emulator::Options::default();
    for model in [DECODER_FREE, STANDARD] {
        trains_like_the_reference(cuda::<f32>(options.clone()), model, 1e-4);
        trains_like_the_reference(cuda::<bf16>(options.clone()), model, 0.05);
    }
    let settings = settings(DECODER_FREE, ADAM);
    resumes_exactly(cuda::<bf16>(options.clone()), &settings);
    // What is measured of a trained model.
    let (x, labels) = (rows(40), None);
    let part = || Part { x: x.clone(), rows: 40, labels: labels.clone() };
    let data = Dataset { train: part(), test: part(), inputs: INPUTS, image: None, source: String::new() };
    let found = evaluate(&trained_on(cuda::<f32>(options), &settings, &x, 3), &data).unwrap().metrics;
    let expected = evaluate(&trained(&settings, &x, 3), &data).unwrap().metrics;
    assert_eq!(found.dead_units, expected.dead_units);
    for (found, expected) in [
        (found.redundancy, expected.redundancy),
        (found.responsibility_entropy, expected.responsibility_entropy),
        (found.reconstruction_mse, expected.reconstruction_mse),
    ] {
        assert!((found - expected).abs() < 1e-3 * expected.abs().max(0.1), "{found} is not {expected}");
    }
}

#[test]
fn training_lowers_the_loss_and_depends_on_the_seed() {
    let x = rows(48);
    for model in [DECODER_FREE, STANDARD] {
        let settings = settings(model, ADAM);
        let trainer = trained(&settings, &x, 30);
        let total = |epoch: usize| *trainer.history()[epoch].last().unwrap();
        assert!(total(29) < total(0), "{model:?}: {} then {}", total(0), total(29));
        let other = trained(&Settings { seed: 6, ..settings }, &x, 1);
        assert_ne!(other.history()[0], trainer.history()[0]);
    }
}

#[test]
fn micro_batches_do_not_change_the_training() {
    let x = rows(40);
    let whole = trained(&settings(DECODER_FREE, ADAM), &x, 3);
    let blocks = trained(&Settings { micro_batch: Some(5), ..settings(DECODER_FREE, ADAM) }, &x, 3);
    let pairs = whole.parameter("weight").unwrap().into_iter().zip(blocks.parameter("weight").unwrap());
    for (whole, blocks) in pairs {
        assert!((whole - blocks).abs() < 1e-6, "{whole} {blocks}");
    }
}

#[test]
fn a_last_row_without_a_variance_is_left_out() {
    let trainer = Trainer::new(Reference, settings(DECODER_FREE, ADAM)).unwrap();
    assert_eq!(trainer.batches(33).collect::<Vec<_>>(), [16, 16]);
    assert_eq!(trainer.batches(34).collect::<Vec<_>>(), [16, 16, 2]);
    let trainer = Trainer::new(Reference, settings(STANDARD, ADAM)).unwrap();
    assert_eq!(trainer.batches(33).collect::<Vec<_>>(), [16, 16, 1]);
    trained(&settings(DECODER_FREE, ADAM), &rows(33), 1);
}

#[test]
fn every_row_is_seen_once_an_epoch_in_a_fresh_order() {
    // Without a step, an epoch's mean of a row-wise loss does not depend on the order, but each batch's does.
    let x = rows(32);
    let lse = Model::DecoderFree { lambda_lse: 1.0, lambda_var: 0.0, lambda_tc: 0.0, lambda_wr: 0.0 };
    let still = settings(lse, Optimizer::Sgd { learning_rate: 0.0, momentum: 0.0 });
    let mut trainer = Trainer::new(Reference, still).unwrap();
    let mut first_batches = Vec::new();
    for _ in 0..2 {
        let mut losses = Vec::new();
        trainer.train_epoch(&x, |terms| losses.push(terms[0])).unwrap();
        assert_eq!(losses.len(), 2);
        first_batches.push(losses[0]);
    }
    assert_ne!(first_batches[0], first_batches[1]);
    assert!((trainer.history()[0][0] - trainer.history()[1][0]).abs() < 1e-9);
}

#[test]
fn a_loss_that_is_not_finite_ends_the_training() {
    let x = rows(40);
    let explosive = settings(STANDARD, Optimizer::Sgd { learning_rate: 1e160, momentum: 0.0 });
    let mut trainer = Trainer::new(Reference, explosive).unwrap();
    let error = (0..20).find_map(|_| trainer.train_epoch(&x, |_| ()).err()).expect("it cannot stay finite");
    let text = error.to_string();
    assert!(text.contains("not finite in epoch 1, step 2") || text.contains("not finite in epoch 1, step 3"), "{text}");
}

#[test]
fn checkpoints_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let text = |path| format!("{:#}", Checkpoint::read(path).unwrap_err());
    assert!(text(&path).contains("cannot read the checkpoint"));

    let whole = trained(&settings(DECODER_FREE, ADAM), &rows(40), 1).checkpoint().unwrap();
    whole.write(&path).unwrap();
    assert_eq!(Checkpoint::read(&path).unwrap().epoch, 1);
    assert!(!folder.path().join("checkpoint.safetensors.part").exists());

    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert!(text(&path).contains("not a checkpoint"));

    let mut other = whole.clone();
    other.tensors.retain(|tensor| tensor.name != "bias.first_moment");
    let error = Trainer::resume(Reference, &other).err().unwrap().to_string();
    assert!(error.contains("bias.first_moment"), "{error}");

    let mut other = whole.clone();
    other.settings.latents += 1;
    assert!(Trainer::resume(Reference, &other).err().unwrap().to_string().contains("weight"));

    let other = Checkpoint { real: "f32".to_owned(), ..whole };
    assert!(Trainer::resume(Reference, &other).err().unwrap().to_string().contains("f32"));
}

#[test]
fn evaluation_of_either_model() {
    let x = rows(60);
    let labels: Vec<u8> = x.chunks(INPUTS).map(|row| u8::from(row[0] > 0.5)).collect();
    let part = Part { rows: 60, x: x.clone(), labels: Some(labels) };
    let data = Dataset { source: String::new(), inputs: INPUTS, image: None, train: part.clone(), test: part.clone() };
    for model in [DECODER_FREE, STANDARD] {
        let trainer = trained(&settings(model, ADAM), &x, 60);
        let found = evaluate(&trainer, &data).unwrap();
        let metrics = &found.metrics;
        assert_eq!(metrics.dead_units, found.variance.iter().filter(|v| **v < 0.01).count());
        assert!(
            (0.0..=4.0).contains(&metrics.l0) && (0.0..=4f64.ln() + 1e-6).contains(&metrics.responsibility_entropy)
        );
        assert!(metrics.probe_accuracy.unwrap() > 0.6, "{metrics:?}");
        assert!((0.0..1.0).contains(&metrics.reconstruction_mse) && metrics.redundancy >= 0.0, "{metrics:?}");
        // No labels, no probe; and the test set's rows come in any number.
        let without = Part { rows: 13, x: x[..13 * INPUTS].to_vec(), labels: None };
        let data = Dataset { train: without.clone(), test: without, ..data.clone() };
        assert_eq!(evaluate(&trainer, &data).unwrap().metrics.probe_accuracy, None);
    }
}
