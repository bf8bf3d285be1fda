//! Checkpoints of PyTorch made in code, whole and spoilt.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

/// Hundredths of a second, far more than a header of some kilobytes computes.
const SLOW: u64 = 500;

/// Hundredths of a second that this thread has computed, whatever else the machine does; 0 where the system does not tell.
fn computed() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap_or_default();
    // The name in front of the fields ends in a bracket.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/fixtures").join(name)
}

/// Rounds of the random tests; more with the environment variable `FUZZ_ROUNDS`.
fn rounds() -> usize {
    std::env::var("FUZZ_ROUNDS").map_or(1000, |text| text.parse().expect("FUZZ_ROUNDS is a number"))
}

/// What can be told of an archive beside names and contents.
#[derive(Clone, Copy, Default)]
struct Style {
    method: u16,
    flags: u16,
    zip64: bool,
}

/// Writes an archive of stored members.
fn archive(members: &[(&str, &[u8])], style: Style) -> Vec<u8> {
    let saturated = u32::MAX.to_le_bytes();
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in members {
        let (at, len) = (out.len(), u32::try_from(content.len()).unwrap().to_le_bytes());
        let name_len = u16::try_from(name.len()).unwrap().to_le_bytes();
        let common = [[45, 0], style.flags.to_le_bytes(), style.method.to_le_bytes()].concat();
        let times_and_checksum = [0; 8];
        out.extend([&b"PK\x03\x04"[..], &common, &times_and_checksum, &len, &len, &name_len, &[0, 0]].concat());
        out.extend(name.as_bytes());
        out.extend(*content);

        let (wide, extra_len) = if style.zip64 { (saturated, [28, 0]) } else { (len, [0, 0]) };
        let offset = if style.zip64 { saturated } else { u32::try_from(at).unwrap().to_le_bytes() };
        directory.extend([&b"PK\x01\x02"[..], &[45, 0], &common, &times_and_checksum, &wide, &wide].concat());
        directory.extend([&name_len[..], &extra_len, &[0; 10], &offset, name.as_bytes()].concat());
        if style.zip64 {
            directory.extend([1, 0, 24, 0]);
            for number in [content.len(), content.len(), at] {
                directory.extend((number as u64).to_le_bytes());
            }
        }
    }
    let (start, len, count) = (out.len(), directory.len(), members.len());
    out.extend(directory);
    if style.zip64 {
        let at = out.len() as u64;
        out.extend([&b"PK\x06\x06"[..], &44u64.to_le_bytes(), &[45, 0, 45, 0], &[0; 8]].concat());
        for number in [count, count, len, start] {
            out.extend((number as u64).to_le_bytes());
        }
        out.extend([&b"PK\x06\x07"[..], &[0; 4], &at.to_le_bytes(), &[1, 0, 0, 0]].concat());
        out.extend([&b"PK\x05\x06"[..], &[0; 4], &[0xff; 12], &[0, 0]].concat());
    } else {
        let count = u16::try_from(count).unwrap().to_le_bytes();
        out.extend([&b"PK\x05\x06"[..], &[0; 4], &count, &count].concat());
        out.extend(u32::try_from(len).unwrap().to_le_bytes());
        out.extend(u32::try_from(start).unwrap().to_le_bytes());
        out.extend([0, 0]);
    }
    out
}

/// A checkpoint with this pickle and the storage `0` of 32 bytes.
fn checkpoint(pickle: &[u8]) -> Vec<u8> {
    archive(&[("x/data.pkl", pickle), ("x/byteorder", b"little"), ("x/data/0", &[7; 32])], Style::default())
}

/// A tensor's name, size and numbers.
pub(in crate::checkpoint) type NamedTensor = (String, Vec<usize>, Vec<f32>);

/// A checkpoint of these tensors in f32.
pub(in crate::checkpoint) fn checkpoint_of(tensors: &[NamedTensor]) -> Vec<u8> {
    checkpoint_in("FloatStorage", f32::to_le_bytes, tensors)
}

/// A checkpoint of these tensors in f16, as Llama 2 comes.
pub(in crate::checkpoint) fn checkpoint_of_halves(tensors: &[NamedTensor]) -> Vec<u8> {
    checkpoint_in("HalfStorage", |number| half::f16::from_f32(number).to_le_bytes(), tensors)
}

fn checkpoint_in<const BYTES: usize>(
    class: &str,
    to_bytes: fn(f32) -> [u8; BYTES],
    tensors: &[NamedTensor],
) -> Vec<u8> {
    let mut pickle = b"\x80\x02}".to_vec();
    let mut members = Vec::new();
    for (key, (name, shape, numbers)) in tensors.iter().enumerate() {
        let key = key.to_string();
        let signed = |number: usize| i64::try_from(number).unwrap();
        let strides = (0..shape.len()).map(|dim| signed(shape[dim + 1..].iter().product())).collect();
        let shape = shape.iter().map(|&size| signed(size)).collect();
        let stored = signed(numbers.len());
        let tensor = Written { class, key: &key, stored, offset: 0, shape, strides };
        pickle.extend([text(name), tensor.pickle(), b"s".to_vec()].concat());
        members.push((format!("x/data/{key}"), numbers.iter().flat_map(|&x| to_bytes(x)).collect::<Vec<u8>>()));
    }
    pickle.push(b'.');
    members.push(("x/data.pkl".to_owned(), pickle));
    let members: Vec<_> = members.iter().map(|(name, content)| (name.as_str(), content.as_slice())).collect();
    archive(&members, Style::default())
}

fn text(text: &str) -> Vec<u8> {
    [&b"X"[..], &u32::try_from(text.len()).unwrap().to_le_bytes(), text.as_bytes()].concat()
}

fn int(number: i64) -> Vec<u8> {
    [&[0x8a, 8][..], &number.to_le_bytes()].concat()
}

fn ints(numbers: &[i64]) -> Vec<u8> {
    [b"(".to_vec(), numbers.iter().flat_map(|&number| int(number)).collect(), b"t".to_vec()].concat()
}

/// A tensor as `torch.save` writes it.
#[derive(Clone)]
struct Written<'a> {
    class: &'a str,
    key: &'a str,
    stored: i64,
    offset: i64,
    shape: Vec<i64>,
    strides: Vec<i64>,
}

impl Written<'_> {
    /// Fits into the storage of [`checkpoint`].
    fn new() -> Self {
        Self { class: "FloatStorage", key: "0", stored: 8, offset: 2, shape: vec![2, 3], strides: vec![3, 1] }
    }

    fn storage(&self) -> Vec<u8> {
        let class = format!("ctorch\n{}\n", self.class).into_bytes();
        [b"(".to_vec(), text("storage"), class, text(self.key), text("cpu"), int(self.stored), b"tQ".to_vec()].concat()
    }

    fn pickle(&self) -> Vec<u8> {
        let mut out = b"ctorch._utils\n_rebuild_tensor_v2\n(".to_vec();
        out.extend([self.storage(), int(self.offset), ints(&self.shape), ints(&self.strides)].concat());
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        out
    }
}

/// A pickle of a dictionary with one entry.
fn dict(name: &str, value: &[u8]) -> Vec<u8> {
    [&b"}"[..], &text(name), value, b"s"].concat()
}

fn whole(value: &[u8]) -> Vec<u8> {
    [&[0x80, 2][..], value, b"."].concat()
}

fn read(bytes: &[u8]) -> Result<HashMap<String, TensorEntry>> {
    let before = computed();
    let outcome = parse(Path::new("x.pth"), bytes);
    assert!(computed() - before < SLOW, "{} hundredths of a second", computed() - before);
    for (name, TensorEntry { dtype, shape, range }) in outcome.iter().flatten() {
        assert!(range.start <= range.end && range.end <= bytes.len(), "{name} {range:?}");
        assert_eq!(range.len(), shape.iter().product::<usize>() * dtype.block_bytes(), "{name}");
    }
    outcome
}

#[track_caller]
fn refused(bytes: &[u8], names: &str) -> Error {
    let error = read(bytes).expect_err(names);
    let sentence = error.to_string();
    assert!(sentence.contains("x.pth") && sentence.contains(names), "{sentence}");
    assert!(sentence.len() < 500 && !sentence.contains('\n'), "{sentence}");
    error
}

#[track_caller]
fn refused_tensor(change: impl FnOnce(&mut Written), names: &str) -> Error {
    let mut tensor = Written::new();
    change(&mut tensor);
    let error = refused(&checkpoint(&whole(&dict("name.of.it", &tensor.pickle()))), names);
    assert!(error.to_string().contains("`name.of.it`"), "{error}");
    error
}

#[track_caller]
fn refused_pickle(pickle: &[u8], names: &str) -> Error {
    refused(&checkpoint(pickle), names)
}

#[test]
fn metas_checkpoints_are_read() {
    let file = PthFile::open(fixture("meta-1shard/consolidated.00.pth")).unwrap();
    let tensors = file.tensors();
    assert_eq!(tensors.len(), 3 + 3 * 9 + usize::from(tensors.contains_key("rope.freqs")));
    for (name, shape) in [("tok_embeddings.weight", vec![1000, 64]), ("norm.weight", vec![64])] {
        assert_eq!((tensors[name].dtype, &tensors[name].shape), (WeightFormat::BF16, &shape), "{name}");
    }
    assert_eq!(file.tensor_bytes(), tensors.values().map(|entry| entry.range.len()).sum::<usize>());

    // The halves hold the same numbers: embeddings split by columns, the output by rows.
    let halves = [0, 1].map(|n| PthFile::open(fixture(&format!("meta-2shard/consolidated.0{n}.pth"))).unwrap());
    let bytes =
        |file: &PthFile, name: &str| (*file.shared_bytes()).as_ref()[file.tensors()[name].range.clone()].to_vec();
    let output = halves.each_ref().map(|half| bytes(half, "output.weight")).concat();
    assert_eq!(output, bytes(&file, "output.weight"));
    let [left, right] = halves.each_ref().map(|half| bytes(half, "tok_embeddings.weight"));
    let rows = left.chunks(64).zip(right.chunks(64)).flat_map(|(left, right)| [left, right].concat());
    assert_eq!(rows.collect::<Vec<_>>(), bytes(&file, "tok_embeddings.weight"));
}

#[test]
fn a_tensor_is_a_place_in_the_file() {
    let mut tensor = Written::new();
    let plain = checkpoint(&whole(&dict("a", &tensor.pickle())));
    let entry = &read(&plain).unwrap()["a"];
    assert_eq!((entry.dtype, entry.shape.as_slice()), (WeightFormat::F32, [2, 3].as_slice()));
    assert_eq!(plain[entry.range.clone()], [7; 24]);
    assert_ne!(plain[entry.range.start - 9], 7, "it begins 8 bytes into the storage");

    for wrapper in WRAPPERS {
        let inner = dict("a", &tensor.pickle());
        let outer = [dict(wrapper, &inner), text("epoch"), int(3), b"s".to_vec()].concat();
        assert_eq!(read(&checkpoint(&whole(&outer))).unwrap()["a"].shape, [2, 3]);
    }
    let parameter = [&b"ctorch._utils\n_rebuild_parameter\n"[..], &tensor.pickle(), b"\x88}\x87R"].concat();
    assert_eq!(read(&checkpoint(&whole(&dict("a", &parameter)))).unwrap()["a"].shape, [2, 3]);
    // Notes on versions, as `state_dict` has them.
    let with_notes = [dict("a", &tensor.pickle()), dict("_metadata", b"}"), b"b".to_vec()].concat();
    assert_eq!(read(&checkpoint(&whole(&with_notes))).unwrap().len(), 1);

    let typed = |dtype: &str| {
        let storage = Written { class: "UntypedStorage", stored: 32, ..tensor.clone() }.storage();
        let numbers = [int(1), ints(&[2]), ints(&[1])].concat();
        let tail = format!("\u{89}}}ctorch\n{dtype}\ntR");
        let tail: Vec<u8> = tail.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect();
        let head = b"ctorch._utils\n_rebuild_tensor_v3\n(".to_vec();
        checkpoint(&whole(&dict("a", &[head, storage, numbers, tail].concat())))
    };
    assert_eq!(read(&typed("bfloat16")).unwrap()["a"].range.len(), 4);
    refused(&typed("float8_e4m3fn"), "`torch.float8_e4m3fn`");

    // Sizes of 1 have any stride, and a single number has none.
    for (shape, strides) in [(vec![1, 8, 1], vec![3, 1, 77]), (vec![], vec![]), (vec![1], vec![5])] {
        (tensor.offset, tensor.shape, tensor.strides) = (0, shape, strides);
        assert_eq!(read(&checkpoint(&whole(&dict("a", &tensor.pickle())))).unwrap().len(), 1);
    }
}

#[test]
fn archives_of_several_kinds() {
    let pickle = whole(&dict("a", &Written::new().pickle()));
    let members: [(&str, &[u8]); 3] =
        [("archive/data.pkl", &pickle), ("archive/data/0", &[7; 32]), ("archive/version", b"3\n")];
    let with = |style| archive(&members, style);
    for style in [Style::default(), Style { zip64: true, ..Style::default() }] {
        let mut bytes = with(style);
        assert_eq!(bytes[read(&bytes).unwrap()["a"].range.clone()], [7; 24]);
        let comment_len = bytes.len() - 2;
        bytes[comment_len] = 4;
        bytes.extend(b"PK\x05\x06");
        assert_eq!(bytes[read(&bytes).unwrap()["a"].range.clone()], [7; 24]);
    }
    refused(&with(Style { method: 8, ..Style::default() }), "compressed member `archive/");
    refused(&with(Style { flags: 1, ..Style::default() }), "encrypted member `archive/");
    let pair = |a, b| archive(&[a, b], Style::default());
    refused(&pair(("a/data.pkl", b"}."), ("b/data.pkl", b"}.")), "several");
    refused(&pair(("a/data.pkl", b"}."), ("a/data.pkl", b"}.")), "twice");
    refused(&pair(("a/data.pkl", b"}."), ("a/byteorder", b"big")), "little-endian");
    refused(&pair(("a/data.pk", b"}."), ("a/b/data.pkl", b"}.")), "without `data.pkl`");

    let mut end = with(Style::default());
    let at = end.len() - 12;
    end[at..at + 2].copy_from_slice(&[0xff, 0xff]);
    refused(&end, "the archive's directory");
    end[at - 2..at].copy_from_slice(&[0xff, 0xff]);
    refused(&end, "the archive's directory");
    for at in [end.len() - 10, end.len() - 6] {
        let mut end = with(Style::default());
        end[at..at + 4].copy_from_slice(&[0xff, 0xff, 0xff, 0x7f]);
        assert!(refused(&end, "directory").hint().is_some());
    }
    let mut wide = with(Style { zip64: true, ..Style::default() });
    let at = wide.len() - 22 - 20;
    for (at, names) in [(at - 24, "members"), (at - 16, "directory"), (at - 8, "directory"), (at + 8, "directory")] {
        let kept = wide[at..at + 8].to_vec();
        for number in [u64::MAX, 1 << 63, 1 << 40, u64::MAX - 100] {
            wide[at..at + 8].copy_from_slice(&number.to_le_bytes());
            refused(&wide, names);
        }
        wide[at..at + 8].copy_from_slice(&kept);
    }
}

#[test]
fn what_is_no_archive_is_named() {
    assert!(refused(b"", "ZIP").hint().unwrap().contains("torch.save"));
    refused(b"GGUF and so on", "ZIP");
    refused(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a bare pickle");
    let mut tar = vec![0; 512];
    tar[257..262].copy_from_slice(b"ustar");
    refused(&tar, "a tar archive");
    let folder = PthFile::open(fixture("meta-1shard")).unwrap_err();
    assert!(folder.to_string().contains("a folder"), "{folder}");
    PthFile::open(fixture("none.pth")).unwrap_err();
}

#[test]
fn nothing_in_a_pickle_is_run() {
    let calls: [(&[u8], &str); 9] = [
        (b"cposix\nsystem\nX\x02\0\0\0ls\x85R.", "`posix.system`"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02ls\x85R.", "`posix.system`"),
        (b"(X\x02\0\0\0lsios\nsystem\n.", "`os.system`"),
        (b"cbuiltins\neval\n(X\x01\0\0\0ao.", "`builtins.eval`"),
        (b"ctorch\nload\n.", "`torch.load`"),
        (b"ctorch.storage\n_load_from_bytes\n.", "`torch.storage._load_from_bytes`"),
        (b"ctorch\nFloatStorage\n)R.", "call `torch.FloatStorage`"),
        (b"ccollections\nOrderedDict\n)\x81.", "make an object"),
        (b"\x82\x01.", "extensions"),
    ];
    for (pickle, names) in calls {
        let error = refused_pickle(pickle, names);
        assert!(error.to_string().contains("nothing in a checkpoint is run"), "{error}");
        assert!(error.hint().is_some());
    }
    refused_pickle(b"X\x02\0\0\0ls)R.", "call a text");
    refused_pickle(b"Pfile\n.", "`file`");
    refused_pickle(b"ccollections\nOrderedDict\nX\x02\0\0\0lsb.", "change the state of a name");
    let long = format!("c{}\n{}\n.", "m".repeat(60_000), "n".repeat(60_000));
    refused_pickle(long.as_bytes(), "mmm");
}

#[test]
fn tensors_that_do_not_fit_are_refused() {
    refused_tensor(|t| t.offset = -1, "-1");
    refused_tensor(|t| t.offset = 3, "beyond its storage");
    refused_tensor(|t| t.offset = i64::MAX, "beyond its storage");
    refused_tensor(|t| t.offset = i64::MIN, "beyond its storage");
    refused_tensor(|t| t.stored = 9, "too few");
    refused_tensor(|t| t.stored = 7, "beyond its storage of 7");
    refused_tensor(|t| t.stored = i64::MAX, "too few");
    refused_tensor(|t| t.stored = -1, "too few");
    refused_tensor(|t| t.key = "1", "`1`");
    refused_tensor(|t| t.key = "../data.pkl", "missing");
    refused_tensor(|t| t.class = "DoubleStorage", "DoubleStorage").hint().unwrap();
    refused_tensor(|t| t.class = "LongStorage", "LongStorage");
    refused_tensor(|t| t.class = "UntypedStorage", "UntypedStorage");
    refused_tensor(|t| t.strides = vec![1, 2], "strides [1, 2]").hint().unwrap();
    refused_tensor(|t| t.strides = vec![0, 0], "strides [0, 0]");
    refused_tensor(|t| t.strides = vec![3], "strides [3]");
    refused_tensor(|t| t.strides = vec![3, -1], "-1");
    refused_tensor(|t| t.shape = vec![0, 3], "sizes [0, 3]");
    refused_tensor(|t| t.shape = vec![-2, 3], "-2");
    refused_tensor(|t| (t.shape, t.strides) = (vec![1; 9], vec![1; 9]), "9 sizes");
    let huge = 1 << 62;
    refused_tensor(|t| (t.shape, t.strides) = (vec![4, huge], vec![huge, 1]), "absurdly large");
    refused_tensor(|t| (t.shape, t.strides) = (vec![huge], vec![1]), "absurdly large");
    refused_tensor(|t| (t.shape, t.strides) = (vec![1 << 40], vec![1]), "beyond its storage");
}

#[test]
fn what_is_no_dictionary_of_tensors_is_named() {
    refused_pickle(b"].", "a list");
    refused_pickle(&whole(&dict("epoch", &int(3))), "`epoch` is an integer");
    refused_pickle(&whole(&dict("model", &dict("epoch", b"]"))), "`epoch` is a list");
    refused_pickle(&whole(&[&b"}"[..], &int(1), &Written::new().pickle(), b"s"].concat()), "an integer for its name");
    let both = [dict("model", b"}"), text("state_dict"), b"}s".to_vec()].concat();
    refused_pickle(&whole(&both), "several dictionaries");
    let twice = [dict("a", &Written::new().pickle()), text("a"), Written::new().pickle(), b"s".to_vec()].concat();
    refused_pickle(&whole(&twice), "`a` is given twice");
}

#[test]
fn broken_and_malicious_pickles_end_at_once() {
    for (pickle, names) in [
        (&b""[..], "ends"),
        (b".", "not there"),
        (b"(.", "not there"),
        (b"}(.", "not there"),
        (b"}}.", "leaves values behind"),
        (b"t.", "did not open"),
        (b"}(]]]u.", "key without a value"),
        (b"]]]s.", "no dictionary"),
        (b"}]a.", "no list"),
        (b"h\x07.", "does not have"),
        (b"j\xff\xff\xff\xff.", "does not have"),
        (b"q\0.", "not there"),
        (b"\x80\x06}.", "protocol 6"),
        (b"\x8a\xff", "integer of 255 bytes"),
        (b"\x8b\xff\xff\xff\x7f", "integer of 2147483647 bytes"),
        (b"X\xff\xff\xff\xff", "ends"),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff", "ends"),
        (b"\x8e\0\0\0\0\0\0\0\x80", "ends"),
        (b"X\x01\0\0\0\xff.", "UTF-8"),
        (b"cposix", "endless name"),
        (b"I3\n.", "0x49"),
        (b"NQ.", "no storage"),
        (b"\xff.", "0xff"),
    ] {
        refused_pickle(pickle, names);
    }
    // A list of lists of lists ..., each twice what is before: 2^100000 items.
    let doubled = [&b"]q\x000"[..], &b"(h\0h\0lq\x000".repeat(100_000), b"h\0."].concat();
    refused_pickle(&doubled, "a list");
    let doubled = [&b"]q\x000"[..], &b"h\0h\0\x86q\x000".repeat(100_000), b"h\0."].concat();
    refused_pickle(&doubled, "a tuple");
    // Structures that contain themselves.
    refused_pickle(&[&b"}q\0"[..], &text("model"), b"h\0s."].concat(), "`model` is a dictionary");
    refused_pickle(b"]q\0h\0a.", "a list");
    refused_pickle(&b"(".repeat(1 << 20), "nested");
    refused_pickle(&b"]".repeat(1 << 20), "nested");
    refused_pickle(&b"N0".repeat(1 << 20), "more than 1048576 instructions");
    // A long tuple for the sizes of many tensors.
    let long = [b"(".to_vec(), b"K\x01".repeat(60_000), b"tq\x09".to_vec()].concat();
    let head = [&b"ctorch._utils\n_rebuild_tensor_v2\n("[..], &Written::new().storage(), b"K\0"].concat();
    let shared = [head, long, b"h\x09\x89}tRq\x080}(".to_vec()].concat();
    let entries: Vec<u8> = (0..10_000).flat_map(|n| [text(&n.to_string()), b"h\x08".to_vec()].concat()).collect();
    refused_pickle(&[shared, entries, b"u.".to_vec()].concat(), "60000 sizes");
}

#[test]
fn a_checkpoint_that_is_cut_off_is_refused() {
    let whole = std::fs::read(fixture("meta-1shard/consolidated.00.pth")).unwrap();
    for len in (0..4000).chain((4000..whole.len()).step_by(997)).chain(whole.len() - 3000..whole.len()) {
        assert!(read(&whole[..len]).unwrap_err().hint().is_some(), "{len} bytes");
    }
    let members = zip::members(Path::new("x.pth"), &whole).unwrap();
    let pickle = &whole[members[b"consolidated.00/data.pkl".as_slice()].clone()];
    for len in 0..pickle.len() {
        refused_pickle(&pickle[..len], "pickle");
    }
}

/// Damage at random: an error or tensors within the file, never a panic, at once.
#[test]
fn random_damage_never_panics() {
    let original = std::fs::read(fixture("meta-2shard/consolidated.00.pth")).unwrap();
    let members = zip::members(Path::new("x.pth"), &original).unwrap();
    let pickle = members[b"consolidated.00/data.pkl".as_slice()].clone();
    let directory = original.windows(4).rposition(|window| window == b"PK\x05\x06").unwrap() - 5000;
    let seed = std::env::var("FUZZ_SEED").map_or(20_240_514, |text| text.parse().expect("FUZZ_SEED is a number"));
    let mut rng = StdRng::seed_from_u64(seed);
    let mut read_well = 0;
    for round in 0..rounds() {
        let damaged = if round % 3 == 0 {
            // The archive itself.
            let mut bytes = original.clone();
            let from = if rng.random() { directory } else { 0 };
            damage(&mut bytes, from..if from == 0 { 4000 } else { original.len() - 16 }, &mut rng);
            bytes
        } else {
            let mut bytes = original[pickle.clone()].to_vec();
            for _ in 0..rng.random_range(1..=3) {
                let len = bytes.len();
                damage(&mut bytes, 0..len - 8, &mut rng);
            }
            let mut content: Vec<_> = members.iter().map(|(name, range)| (*name, &original[range.clone()])).collect();
            content.retain(|(name, _)| !name.ends_with(b"data.pkl"));
            content.push((b"consolidated.00/data.pkl", &bytes));
            let content: Vec<_> =
                content.iter().map(|(name, bytes)| (std::str::from_utf8(name).unwrap(), *bytes)).collect();
            archive(&content, Style { zip64: round % 2 == 0, ..Style::default() })
        };
        match std::panic::catch_unwind(|| read(&damaged)) {
            Ok(Ok(_)) => read_well += 1,
            Ok(Err(_)) => {}
            Err(_) => {
                let kept = std::env::temp_dir().join(format!("adaptive-kvcache-panic-{round}.pth"));
                std::fs::write(&kept, &damaged).unwrap();
                panic!("round {round} panicked, with {}", kept.display());
            }
        }
    }
    // Some damage is harmless, most is not: else this would test nothing.
    assert!((1..rounds() * 2 / 3).contains(&read_well), "{read_well} of {} were read", rounds());
}

/// Spoils one place of `bytes[within]`.
fn damage(bytes: &mut Vec<u8>, within: Range<usize>, rng: &mut StdRng) {
    let at = rng.random_range(within);
    match rng.random_range(0..7) {
        0 => bytes[at] ^= 1 << rng.random_range(0..8),
        1 => bytes[at] = rng.random(),
        2 => bytes.insert(at, rng.random()),
        3 => _ = bytes.remove(at),
        4 => bytes.truncate(bytes.len() - rng.random_range(1..16)),
        5 => {
            let instructions = *b"(.012NKMXqhtR}su]aelQcbi\x80\x85\x86\x87\x88\x89\x8a\x8c\x93\x94\x95";
            bytes[at] = instructions[rng.random_range(0..instructions.len())];
        }
        _ => {
            let numbers = [0, 1, 1 << 31, 1 << 32, 1 << 60, 1 << 63, u64::MAX, u64::MAX - 31];
            let number = numbers[rng.random_range(0..numbers.len())];
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
    }
}
