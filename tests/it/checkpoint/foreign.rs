//! What is no usable model: each kind is named, with what to do.

use super::*;

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4976698672\n";
const PAGE: &str = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>";

/// A folder with a tiny model in it, of which one file is replaced.
fn with_file(name: &str, content: impl AsRef<[u8]>) -> TempDir {
    let folder = copy_of(&checkpoints("f16"));
    std::fs::write(folder.path().join(name), content).unwrap();
    folder
}

#[test]
fn pointers_and_pages_are_named_whatever_they_stand_for() {
    for (content, parts) in [(POINTER, ["Git LFS pointer", "git lfs pull"]), (PAGE, ["HTML page", "resolve"])] {
        for name in ["model.safetensors", "config.json", "generation_config.json"] {
            let text = refusal(with_file(name, content).path());
            assert_names(&text, &[name]);
            assert_names(&text, &parts);
        }
        let folder = tempfile::tempdir().unwrap();
        shard(&checkpoints("f16"), folder.path());
        for name in ["model-00002-of-00003.safetensors", "model.safetensors.index.json"] {
            let path = folder.path().join(name);
            let good = std::fs::read(&path).unwrap();
            std::fs::write(&path, content).unwrap();
            let text = refusal(folder.path());
            assert_names(&text, &[name]);
            assert_names(&text, &parts);
            std::fs::write(&path, good).unwrap();
        }
        let folder = with_file("x.gguf", content);
        assert_names(&refusal(&folder.path().join("x.gguf")), &parts);
        for name in ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"] {
            let folder = with_file(name, content);
            let error = checkpoint::open(folder.path()).unwrap().tokenizer().unwrap_err();
            assert_names(&format!("{error}; {}", error.hint().unwrap()), &parts);
            assert_names(&error.to_string(), &[name]);
        }
        for name in ["params.json", "consolidated.00.pth"] {
            let folder = tempfile::tempdir().unwrap();
            for entry in std::fs::read_dir(data("fixtures/meta-1shard")).unwrap() {
                let path = entry.unwrap().path();
                std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
            }
            std::fs::write(folder.path().join(name), content).unwrap();
            let text = refusal(folder.path());
            assert_names(&text, &[name]);
            assert_names(&text, &parts);
        }
    }
}

#[test]
fn other_formats_are_named() {
    let gguf = |name: &str, content: &[u8]| {
        let folder = with_file(name, content);
        refusal(&folder.path().join(name))
    };
    let safetensors = std::fs::read(checkpoints("f16").join("model.safetensors")).unwrap();
    for (name, content, parts) in [
        ("a.gguf", &b""[..], ["empty", "fetch it again"]),
        ("a.gguf", &[0; 4096], ["zeros", "fetch it again"]),
        ("a.bin", b"lmgg\0\x7d\0\0\0\x10\0\0", ["GGML", "convert"]),
        ("a.bin", b"fmgg\x01\0\0\0", ["GGMF", "convert"]),
        ("ggml-model-q4_0.bin", b"tjgg\x03\0\0\0", ["GGJT", "convert"]),
        ("a.gguf", b"GGUF\0\0\0\x03\0\0\0\0\0\0\0\x01", ["big-endian", "gguf_convert_endian"]),
        ("a.gguf", b"Entry not found", ["`Entry not found`", "fetch it again"]),
        ("a.gguf", &safetensors, ["a safetensors file", "config.json"]),
        ("model.onnx", b"\x08\x07\x12\x07pytorch", ["ONNX", "safetensors"]),
        ("a.ckpt", b"PK\x03\x04..........................archive/data.pkl", ["PyTorch", "safetensors"]),
        ("a.gguf.gz", b"\x1f\x8b\x08\0", ["gzip", "unpack"]),
    ] {
        assert_names(&gguf(name, content), &[&[name][..], &parts].concat());
    }
    let folder = with_file("model.safetensors", b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_names(&refusal(folder.path()), &["model.safetensors", "GGUF", ".gguf"]);
}

#[test]
fn folders_without_a_model_are_told_what_they_hold() {
    let check = |files: &[(&str, &str)], parts: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        assert_names(&refusal(folder.path()), parts);
    };
    let adapter = ("adapter_config.json", r#"{"peft_type": "LORA", "base_model_name_or_path": "org/base-7b"}"#);
    check(&[adapter, ("adapter_model.safetensors", "")], &["adapter (LoRA)", "`org/base-7b`", "merge_and_unload"]);
    check(
        &[adapter, ("config.json", "{}"), ("model.safetensors", "")],
        &["adapter", "take `adapter_config.json` away"],
    );
    check(&[("adapter_config.json", "{"), ("adapter_model.bin", "")], &["adapter"]);
    check(&[("params.json", "{}"), ("consolidated.safetensors", "")], &["Mistral's own layout", "config.json"]);
    check(&[("config.json", "{}"), ("consolidated-00001-of-00002.safetensors", "")], &["Mistral's own layout"]);
    check(&[("consolidated.00.pth", "")], &["no `params.json`"]);
    check(&[("tokenizer.json", "{}"), ("config.json", "{}")], &["only a tokenizer"]);
    check(&[("config.json", "{}"), ("onnx.onnx", "")], &["ONNX", "onnx.onnx"]);
    check(&[("config.json", "{}"), ("tf_model.h5", "")], &["TensorFlow", "tf_model.h5"]);
    check(&[("config.json", "{}"), ("weights.npz", "")], &["MLX", "weights.npz"]);
    check(&[("readme", ""), ("7B/params.json", "{}")], &["holds no model", "did you mean", "7B"]);
}

#[test]
fn other_quantisations_are_named() {
    let check = |change: &dyn Fn(&mut Value), parts: &[&str]| {
        let text = refusal(with_config(&checkpoints("linear"), change).path());
        assert_names(&text, &["config.json", "not supported", "GGUF"]);
        assert_names(&text, parts);
    };
    for method in ["gptq", "awq", "fp8", "bitsandbytes", "compressed-tensors", "mxfp4"] {
        check(&|config| config["quantization_config"] = json!({"quant_method": method}), &[method]);
    }
    check(&|config| config["quantization_config"] = json!({"load_in_4bit": true}), &["bitsandbytes"]);
    check(&|config| config["quantization"] = json!({"group_size": 64, "bits": 4}), &["MLX"]);
    let mlx = json!({"group_size": 64, "bits": 4});
    check(&|config| (config["quantization"], config["quantization_config"]) = (mlx.clone(), mlx.clone()), &["mlx"]);
    let check = |tensor: &str, parts: &[&str]| {
        let folder = with_tensors(&checkpoints("linear"), |tensors| {
            let name = format!("model.layers.0.mlp.up_proj.{tensor}");
            tensors.insert(name, Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap());
        });
        assert_names(&refusal(folder.path()), parts);
    };
    check("qzeros", &["GPTQ", "qzeros"]);
    check("weight.absmax", &["bitsandbytes"]);
    check("weight.quant_state.bitsandbytes__nf4", &["bitsandbytes"]);
    check("weight_scale_inv", &["FP8"]);
    check("scales", &["MLX"]);
    check("lora_A.weight", &["LoRA"]);
}
