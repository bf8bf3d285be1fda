//! Models in several files, and numbers that lie where no number usually does.

use super::*;

#[test]
fn several_files_are_as_good_as_one() {
    for name in FIXTURES {
        let source = data("fixtures").join(name);
        let folder = tempfile::tempdir().unwrap();
        shard(&source, folder.path());
        let run = |path: &Path| logits(&model(path, WeightDtype::Auto), &[1, 7, 300, 5], &[9, 8]);
        let expected = run(&source);
        assert_eq!(run(folder.path()), expected);
        // Any of the files stands for the model.
        assert_eq!(run(&folder.path().join("model-00002-of-00003.safetensors")), expected);
        assert_eq!(run(&folder.path().join("model.safetensors.index.json")), expected);
        assert_eq!(run(&source.join("model.safetensors")), expected);
    }
}

#[test]
fn numbers_at_odd_addresses_are_computed_with_all_the_same() {
    for name in ["biases", "f16", "bf16"] {
        let folder = copy_of(&checkpoints(name));
        let run = |path: &Path, dtype| logits(&model(path, dtype), &[1, 7, 30, 5], &[9, 8]);
        let path = folder.path().join("model.safetensors");
        let (header, bytes) = split_header(&std::fs::read(&path).unwrap());
        for spaces in 1..4 {
            // Older writers did not fill the header up to a multiple of 8.
            std::fs::write(&path, assemble(&format!("{}{}", header.trim_end(), " ".repeat(spaces)), &bytes)).unwrap();
            for dtype in [WeightDtype::Auto, WeightDtype::F32, WeightDtype::F16] {
                assert_eq!(run(folder.path(), dtype), run(&checkpoints(name), dtype), "{name}, {spaces} spaces");
            }
        }
    }
}

#[test]
fn a_split_gguf_model_is_one_model() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole.gguf");
    Fixture::read("llama3-rope").write_gguf(&whole, GgmlDType::F16);
    let parts = tempfile::tempdir().unwrap();
    split_gguf(&whole, parts.path(), 3, |_, _| {});
    let expected = logits(&model(&whole, WeightDtype::Auto), &[1, 7, 300, 5], &[9, 8]);
    let part = |index: usize| parts.path().join(format!("tiny-{index:05}-of-00003.gguf"));
    for path in [part(1), part(2), part(3), parts.path().to_owned()] {
        assert_eq!(logits(&model(&path, WeightDtype::Auto), &[1, 7, 300, 5], &[9, 8]), expected);
    }
    assert_eq!(logits(&model(folder.path(), WeightDtype::Auto), &[1, 7, 300, 5], &[9, 8]), expected);
    let loaded = checkpoint::load(part(2), WeightDtype::Auto).unwrap();
    assert_eq!((loaded.format, loaded.dtype.as_str()), (Format::Gguf, "f16"));

    std::fs::rename(part(2), parts.path().join("elsewhere")).unwrap();
    assert_names(&refusal(&part(1)), &["tiny-00002-of-00003.gguf", "No such file", "3 parts"]);
    std::fs::copy(part(3), part(2)).unwrap();
    assert_names(&refusal(&part(1)), &["tiny-00002-of-00003.gguf", "expected part 1 of 3", "got 2 of 3"]);
    std::fs::rename(part(1), parts.path().join("renamed.gguf")).unwrap();
    assert_names(&refusal(&parts.path().join("renamed.gguf")), &["renamed.gguf", "one of 3 parts"]);

    split_gguf(&whole, parts.path(), 3, |index, metadata| {
        if index == 0 {
            metadata[2].1 = GgufValue::I32(7);
        }
    });
    assert_names(&refusal(&part(1)), &["expected 7 tensors in all 3 parts"]);
    // Two models in one folder: nobody knows which is meant.
    std::fs::copy(&whole, parts.path().join("whole.gguf")).unwrap();
    assert_names(&refusal(parts.path()), &["holds 3 models", "path of one"]);
}
