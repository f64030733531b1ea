//! Forward passes of tiny random models: the same bits whatever the kernel,
//! the number of threads, the batch and the chunks. What they compute is
//! tested from Python, against numpy and against transformers' logits.

mod common;

use std::collections::HashMap;

use bitnet_rs::Error;
use bitnet_rs::cpu::Isa;
use bitnet_rs::kernels::{self, Activations};
use bitnet_rs::kv_cache::{KvCache, KvDtype};
use bitnet_rs::models::{
    self, ConfigMap, Machine, Model, Segment, Tensor, TensorData, Value, Visit, Want, Wanted,
    Weights,
};

/// Tensors of a random model.
enum Owned {
    Trits(Vec<usize>, Vec<i8>),
    Floats(Vec<usize>, Vec<f32>),
}

struct Random(HashMap<String, Owned>);

impl Weights for Random {
    fn contains(&self, name: &str) -> Result<bool, Error> {
        Ok(self.0.contains_key(name))
    }

    fn visit(&self, name: &str, visit: &mut Visit<'_>) -> Result<(), Error> {
        match self.0.get(name) {
            None => Err(Error::MissingTensor(name.to_owned())),
            Some(Owned::Trits(shape, v)) => visit(&Tensor { shape, data: TensorData::I8(v) }),
            Some(Owned::Floats(shape, v)) => visit(&Tensor { shape, data: TensorData::F32(v) }),
        }
    }
}

/// Hidden size, feed-forward size, query heads, key/value heads, head size.
const SIZES: [[usize; 5]; 2] = [[52, 100, 6, 2, 20], [64, 300, 4, 4, 18]];
const VOCAB: usize = 37;
const LAYERS: usize = 2;

fn config(model_type: &str, [hidden, inter, heads, kv_heads, head_dim]: [usize; 5]) -> ConfigMap {
    let act = match model_type {
        "bitnet" => "relu2",
        "gemma3_text" => "gelu_pytorch_tanh",
        _ => "silu",
    };
    let int = |n: usize| Value::Int(n as i64);
    let fields = [
        ("model_type", Value::Str(model_type.to_owned())),
        ("hidden_act", Value::Str(act.to_owned())),
        ("hidden_size", int(hidden)),
        ("intermediate_size", int(inter)),
        ("num_hidden_layers", int(LAYERS)),
        ("num_attention_heads", int(heads)),
        ("num_key_value_heads", int(kv_heads)),
        ("head_dim", int(head_dim)),
        ("vocab_size", int(VOCAB)),
        ("rms_norm_eps", Value::Float(1e-5)),
        ("rope_theta", Value::Float(10_000.0)),
        ("max_position_embeddings", int(512)),
        ("tie_word_embeddings", Value::Bool(model_type == "bitnet")),
    ];
    let gemma = [
        ("query_pre_attn_scalar", int(head_dim)),
        ("layer_kinds", Value::Str("sf".to_owned())),
        ("sliding_window", int(13)),
        ("rope_local_base_freq", Value::Float(1000.0)),
    ];
    let more = gemma.into_iter().filter(|_| model_type == "gemma3_text");
    ConfigMap(fields.into_iter().chain(more).map(|(k, v)| (k.to_owned(), v)).collect())
}

fn weights(
    model_type: &str,
    [hidden, inter, heads, kv_heads, head_dim]: [usize; 5],
) -> HashMap<String, Owned> {
    let mut state = 7u64;
    let mut next = move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    let mut out = HashMap::new();
    let mut floats = |name: String, shape: Vec<usize>, around: f32| {
        let n = shape.iter().product();
        let v = (0..n).map(|_| around + (next() % 2001) as f32 / 1e3 - 1.0).collect();
        (name, Owned::Floats(shape, v))
    };
    let (q, kv) = (heads * head_dim, kv_heads * head_dim);
    out.extend([floats("model.embed_tokens.weight".into(), vec![VOCAB, hidden], 0.0)]);
    out.extend([floats("lm_head.weight".into(), vec![VOCAB, hidden], 0.0)]);
    out.extend([floats("model.norm.weight".into(), vec![hidden], 1.5)]);
    for i in 0..LAYERS {
        let layer = |part: &str| format!("model.layers.{i}.{part}.weight");
        for (part, n, of) in [
            ("input_layernorm", hidden, ""),
            ("post_attention_layernorm", hidden, ""),
            ("self_attn.attn_sub_norm", q, "bitnet"),
            ("mlp.ffn_sub_norm", inter, "bitnet"),
            ("self_attn.q_norm", head_dim, "3"),
            ("self_attn.k_norm", head_dim, "3"),
            ("pre_feedforward_layernorm", hidden, "gemma3"),
            ("post_feedforward_layernorm", hidden, "gemma3"),
            ("self_attn.q_proj.norm", hidden, "gemma3"),
            ("self_attn.k_proj.norm", hidden, "gemma3"),
            ("self_attn.v_proj.norm", hidden, "gemma3"),
            ("self_attn.o_proj.norm", q, "gemma3"),
            ("mlp.gate_proj.norm", hidden, "gemma3"),
            ("mlp.up_proj.norm", hidden, "gemma3"),
            ("mlp.down_proj.norm", inter, "gemma3"),
        ] {
            if model_type.contains(of) {
                out.extend([floats(layer(part), vec![n], 1.5)]);
            }
        }
        for (part, rows, cols) in [
            ("self_attn.q_proj", q, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, q),
            ("mlp.gate_proj", inter, hidden),
            ("mlp.up_proj", inter, hidden),
            ("mlp.down_proj", hidden, inter),
        ] {
            let (name, masters) = floats(layer(part), vec![rows, cols], 0.0);
            let Owned::Floats(shape, v) = masters else { unreachable!() };
            // One projection stays a master matrix, quantized by the core.
            if part.contains("v_proj") {
                out.insert(name, Owned::Floats(shape, v));
            } else {
                let trits = v.iter().map(|x| x.round() as i8).collect();
                out.insert(format!("{name}_scale"), Owned::Floats(vec![1], vec![0.5]));
                out.insert(name, Owned::Trits(shape, trits));
            }
        }
    }
    out
}

fn machine(kernel: &str, batch: Option<&[String]>, threads: usize) -> Result<Machine, Error> {
    let float = kernel.ends_with("-float");
    let activations = if float { Activations::Float } else { Activations::Int8 };
    Machine::new(activations, Some(kernel), batch, Some(threads))
}

fn build(model_type: &str, sizes: [usize; 5], kernel: &str, threads: usize) -> Box<dyn Model> {
    let machine = machine(kernel, None, threads).unwrap();
    models::load(&config(model_type, sizes), &Random(weights(model_type, sizes)), machine).unwrap()
}

fn cache(model: &dyn Model, dtype: KvDtype) -> KvCache {
    KvCache::new(model.kv_shape(), 200, dtype).unwrap()
}

fn run(model: &dyn Model, cache: &mut KvCache, tokens: &[u32]) -> Vec<u32> {
    let y = model.pass(&mut [Segment { tokens, cache }], Wanted::All).unwrap().rows;
    assert!(y.iter().all(|v| v.is_finite()) && y.iter().any(|v| *v != 0.0));
    y.into_iter().map(f32::to_bits).collect()
}

fn tokens(n: usize, seed: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * i * 7 + i * 3 + seed) % VOCAB) as u32).collect()
}

/// Every case that the promises range over.
fn each(f: impl Fn(&str, [usize; 5], KvDtype)) {
    let mut cases = Vec::new();
    for model_type in ["bitnet", "llama"] {
        for sizes in SIZES {
            for dtype in [KvDtype::F16, KvDtype::F32] {
                cases.push((model_type, sizes, dtype));
            }
        }
    }
    // Qwen3 without, Gemma 3 with norms of projections and two kinds of layers.
    cases.push(("qwen3", SIZES[0], KvDtype::F16));
    cases.push(("gemma3_text", SIZES[1], KvDtype::F32));
    for (model_type, sizes, dtype) in cases.into_iter().step_by(common::one_in()) {
        f(model_type, sizes, dtype);
    }
}

#[test]
fn kernels_and_threads_give_the_same_bits() {
    let ids = tokens(150, 1);
    // Emulated, a pass takes a second.
    let all: &[usize] = if common::one_in() == 1 { &[1, 2, 3, 16] } else { &[2, 16] };
    each(|model_type, sizes, dtype| {
        let generic = build(model_type, sizes, "generic-i2", 1);
        let right = run(&*generic, &mut cache(&*generic, dtype), &ids);
        for kernel in kernels::available(Isa::best().unwrap()) {
            for &threads in all {
                let model = build(model_type, sizes, kernel.name(), threads);
                let found = run(&*model, &mut cache(&*model, dtype), &ids);
                assert!(found == right, "{model_type} {} {threads} threads", kernel.name());
            }
        }
    });
}

#[test]
fn chunks_and_single_tokens_give_the_bits_of_one_pass() {
    let ids = tokens(150, 2);
    each(|model_type, sizes, dtype| {
        let model = build(model_type, sizes, kernels::available(Isa::best().unwrap())[0].name(), 2);
        let right = run(&*model, &mut cache(&*model, dtype), &ids);
        for chunk in [1, 2, 7, 16, 64, 129] {
            let mut cache = cache(&*model, dtype);
            let found: Vec<u32> =
                ids.chunks(chunk).flat_map(|part| run(&*model, &mut cache, part)).collect();
            assert!(found == right, "{model_type}, chunks of {chunk}");
        }
    });
}

/// The last layer computes the rows whose logits are wanted, by the kernel for so many;
/// and where none are, keys and values alone.
#[test]
fn kernels_may_change_with_the_number_of_rows() {
    let ids = tokens(60, 4);
    let isa = Isa::best().unwrap();
    each(|model_type, sizes, dtype| {
        if dtype == KvDtype::F32 {
            return; // not what changes here, and scalar code is slow
        }
        let right = {
            let model = build(model_type, sizes, "generic-i2", 1);
            run(&*model, &mut cache(&*model, dtype), &ids)
        };
        let kernels = kernels::available(isa);
        for one in &kernels {
            let others: Vec<String> = kernels
                .iter()
                .filter(|k| k.layout().name() == one.layout().name())
                .map(|k| k.name().to_owned())
                .collect();
            let batch: Vec<String> = others.iter().cycle().take(5).cloned().collect();
            let machine = machine(one.name(), Some(&batch), 2).unwrap();
            let weights = Random(weights(model_type, sizes));
            let model = models::load(&config(model_type, sizes), &weights, machine).unwrap();
            let mut cache = cache(&*model, dtype);
            for (end, part) in [(40, &ids[..40]), (59, &ids[40..59]), (60, &ids[59..])] {
                let mut batch = [Segment { tokens: part, cache: &mut cache }];
                let wants = [if end == 40 { Want::Nothing } else { Want::All }];
                let y = model.pass(&mut batch, Wanted::Each(&wants)).unwrap().rows;
                let found: Vec<u32> = y.into_iter().map(f32::to_bits).collect();
                let expected =
                    if end == 40 { &[][..] } else { &right[(end - 1) * VOCAB..end * VOCAB] };
                assert!(found == expected, "{model_type} {} and others", one.name());
            }
        }
    });
    let n = kernels::INPUTS.len() - 1;
    let names = vec!["generic-i2".to_owned(); n + 1];
    assert!(machine("generic-i2", Some(&names[..n]), 1).is_ok());
    assert!(machine("generic-i2", Some(&names), 1).is_err());
    assert!(machine("generic-t5", Some(&names[..n]), 1).is_err());
}

#[test]
fn a_ragged_batch_gives_the_bits_of_each_alone() {
    each(|model_type, sizes, dtype| {
        let model = build(model_type, sizes, kernels::available(Isa::best().unwrap())[0].name(), 2);
        let lengths = [1, 40, 3, 1, 17, 90, 2, 1];
        let sequences: Vec<_> = lengths
            .iter()
            .enumerate()
            .map(|(i, &n)| (tokens(5 * i, i), tokens(n, 3 * i)))
            .collect();
        let mut right = Vec::new();
        let mut last = Vec::new();
        let mut caches = Vec::new();
        for (prefix, ids) in &sequences {
            let mut alone = cache(&*model, dtype);
            let mut shared = cache(&*model, dtype);
            if !prefix.is_empty() {
                run(&*model, &mut alone, prefix);
                run(&*model, &mut shared, prefix);
            }
            let rows = run(&*model, &mut alone, ids);
            last.extend_from_slice(&rows[rows.len() - VOCAB..]);
            right.extend(rows);
            caches.push(shared);
        }
        for wanted in [Wanted::All, Wanted::Last] {
            let lengths: Vec<_> = caches.iter().map(KvCache::len).collect();
            let mut batch: Vec<_> = sequences
                .iter()
                .zip(&mut caches)
                .map(|((_, ids), cache)| Segment { tokens: ids, cache })
                .collect();
            let y = model.pass(&mut batch, wanted).unwrap().rows;
            let found: Vec<u32> = y.into_iter().map(f32::to_bits).collect();
            assert!(found == if wanted == Wanted::All { right.clone() } else { last.clone() });
            // Truncated, the caches give the same again.
            for (cache, length) in caches.iter_mut().zip(lengths) {
                cache.truncate(length).unwrap();
            }
        }
    });
}

/// The best `k` of a row, ids ascending.
fn best(row: &[f32], k: usize) -> Vec<(u32, u32)> {
    let mut ids: Vec<usize> = (0..row.len()).collect();
    ids.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
    ids.truncate(k);
    ids.sort_unstable();
    ids.iter().map(|&i| (i as u32, row[i].to_bits())).collect()
}

#[test]
fn the_best_logits_are_those_of_the_full_head() {
    each(|model_type, sizes, dtype| {
        for threads in [1, 3] {
            let model = build(
                model_type,
                sizes,
                kernels::available(Isa::best().unwrap())[0].name(),
                threads,
            );
            let prompts: Vec<_> = (0..6).map(|i| tokens(1 + 3 * i, i)).collect();
            let wants = [
                Want::Top(1),
                Want::All,
                Want::Nothing,
                Want::Top(5),
                Want::Top(VOCAB),
                Want::Top(10 * VOCAB),
            ];
            let mut caches: Vec<_> = prompts.iter().map(|_| cache(&*model, dtype)).collect();
            let mut batch: Vec<_> = prompts
                .iter()
                .zip(&mut caches)
                .map(|(tokens, cache)| Segment { tokens, cache })
                .collect();
            let mut found = model.pass(&mut batch, Wanted::Each(&wants)).unwrap();
            let used = model.head_use();
            assert_eq!(used.scans, 4);
            assert!(used.full <= 4 && used.rescored <= 4 * VOCAB as u64);
            found.top.reverse();
            for (prompt, want) in prompts.iter().zip(wants) {
                let mut alone = cache(&*model, dtype);
                let mut batch = [Segment { tokens: prompt, cache: &mut alone }];
                let row = model.pass(&mut batch, Wanted::Last).unwrap().rows;
                match want {
                    Want::Nothing | Want::Hidden => {}
                    Want::All => assert_eq!(
                        row.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
                        found.rows.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
                    ),
                    Want::Top(k) => {
                        let top = found.top.pop().unwrap();
                        let bits = top.logits.iter().map(|x| x.to_bits());
                        let pairs: Vec<_> = top.ids.iter().copied().zip(bits).collect();
                        assert_eq!(pairs, best(&row, k), "{model_type}, best {k}");
                    }
                }
            }
        }
    });
}

/// With float activations and a scale for each 64 columns.
#[test]
fn float_activations_give_the_same_bits_everywhere() {
    let sizes = [64, 128, 2, 1, 32];
    let ids = tokens(11, 5);
    let isa = Isa::best().unwrap();
    for model_type in ["llama", "gemma3_text"] {
        let mut config = config(model_type, sizes);
        config.0.insert("activations".to_owned(), Value::Str("float".to_owned()));
        let mut right = None;
        for kernel in kernels::available_grouped(isa, Activations::Float).into_iter().rev() {
            for threads in [3, 1].into_iter().take(if right.is_none() { 2 } else { 1 }) {
                let mut weights = weights(model_type, sizes);
                let down = "model.layers.0.mlp.down_proj.weight_scale".to_owned();
                let scales = (0..128).map(|i| 0.1 + i as f32 / 64.0).collect();
                weights.insert(down, Owned::Floats(vec![64, 2], scales));
                let machine = machine(kernel.name(), None, threads).unwrap();
                let model = models::load(&config, &Random(weights), machine).unwrap();
                for chunk in [11, 1, 7] {
                    let mut cache = cache(&*model, KvDtype::F16);
                    let found: Vec<u32> =
                        ids.chunks(chunk).flat_map(|part| run(&*model, &mut cache, part)).collect();
                    let right = right.get_or_insert_with(|| found.clone());
                    assert!(found == *right, "{model_type} {} {threads} {chunk}", kernel.name());
                }
            }
        }
        // Whoever names a kernel of other activations, or one that holds a single scale.
        for kernel in ["generic-i2", "generic-i2g-int8"] {
            let machine = machine(kernel, None, 1).unwrap();
            let weights = Random(weights(model_type, sizes));
            let error = models::load(&config, &weights, machine).err().unwrap().to_string();
            assert!(error.contains("int8") && error.contains("float"), "{error}");
        }
    }
    let mut weights = weights("llama", sizes);
    let q = "model.layers.0.self_attn.q_proj.weight_scale".to_owned();
    weights.insert(q, Owned::Floats(vec![64, 1], vec![0.5; 64]));
    let machine = machine("generic-i2", None, 1).unwrap();
    let error = models::load(&config("llama", sizes), &Random(weights), machine).err().unwrap();
    assert!(error.to_string().contains("q_proj") && error.to_string().contains("i2g"), "{error}");
}

/// What the head would take is what the head takes.
#[test]
fn hidden_states_are_those_of_the_last_tokens() {
    each(|model_type, sizes, dtype| {
        let model = build(model_type, sizes, "generic-i2", 2);
        let [a, b] = [tokens(3, 1), tokens(9, 2)];
        let mut caches = [cache(&*model, dtype), cache(&*model, dtype)];
        let [c, d] = &mut caches;
        let mut both = [Segment { tokens: &a, cache: c }, Segment { tokens: &b, cache: d }];
        let wanted = [Want::Hidden, Want::Hidden];
        let found = model.pass(&mut both, Wanted::Each(&wanted)).unwrap();
        assert!(found.rows.is_empty() && found.top.is_empty());
        let width = sizes[0];
        assert_eq!(found.hidden.len(), 2 * width);
        for (ids, hidden) in [&a, &b].into_iter().zip(found.hidden.chunks_exact(width)) {
            let mut alone = cache(&*model, dtype);
            let mut batch = [Segment { tokens: ids, cache: &mut alone }];
            let one = model.pass(&mut batch, Wanted::Each(&[Want::Hidden])).unwrap().hidden;
            assert!(one == hidden && one.iter().any(|x| *x != 0.0));
            // And its product with the head is the logits, but for roundings.
            let mut again = cache(&*model, dtype);
            let logits = run(&*model, &mut again, ids);
            let tensors = weights(model_type, sizes);
            let name =
                if model_type == "bitnet" { "model.embed_tokens.weight" } else { "lm_head.weight" };
            let Some(Owned::Floats(_, head)) = tensors.get(name) else { unreachable!() };
            for (row, logit) in head.chunks_exact(width).zip(&logits[logits.len() - VOCAB..]) {
                let dot: f32 = row.iter().zip(&one).map(|(a, b)| a * b).sum();
                assert!((dot - f32::from_bits(*logit)).abs() < 1e-3 * (1.0 + dot.abs()));
            }
        }
    });
}

#[test]
fn wants_that_are_none_are_refused() {
    let model = build("bitnet", SIZES[0], "generic-i2", 1);
    for wants in [&[][..], &[Want::Top(0)], &[Want::All, Want::All]] {
        let mut cache = cache(&*model, KvDtype::F16);
        let mut batch = [Segment { tokens: &[1], cache: &mut cache }];
        assert!(model.pass(&mut batch, Wanted::Each(wants)).is_err());
    }
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let model = build("bitnet", SIZES[0], "generic-i2", 1);
    let mut small = KvCache::new(model.kv_shape(), 4, KvDtype::F16).unwrap();
    run(&*model, &mut small, &[1, 2]);
    for tokens in [&[][..], &[VOCAB as u32], &[1, 2, 3]] {
        let error = model
            .pass(&mut [Segment { tokens, cache: &mut small }], Wanted::Last)
            .unwrap_err()
            .to_string();
        assert!(error.contains("segment 0"), "{error}");
        assert_eq!(small.len(), 2);
    }
    assert!(model.pass(&mut [], Wanted::Last).is_err());
    // Of the same shape even.
    let other = build("bitnet", SIZES[0], "generic-i2", 1);
    let mut foreign = cache(&*other, KvDtype::F16);
    let mut good = cache(&*model, KvDtype::F16);
    let mut batch =
        [Segment { tokens: &[1], cache: &mut good }, Segment { tokens: &[1], cache: &mut foreign }];
    assert!(model.pass(&mut batch, Wanted::Last).is_err());
    assert_eq!(good.len(), 0);
}

fn refused(change: impl Fn(&mut ConfigMap, &mut HashMap<String, Owned>)) -> String {
    let mut config = config("bitnet", SIZES[0]);
    let mut weights = weights("bitnet", SIZES[0]);
    change(&mut config, &mut weights);
    let machine = machine("generic-i2", None, 1).unwrap();
    models::load(&config, &Random(weights), machine).err().expect("an error").to_string()
}

#[test]
fn configs_that_cannot_be_run_are_refused_by_field() {
    let text = |s: &str| Value::Str(s.to_owned());
    let scaled = ConfigMap(
        [("rope_type".to_owned(), text("llama3")), ("factor".to_owned(), Value::Float(8.0))].into(),
    );
    for (field, value, said) in [
        ("model_type", text("gpt2"), "gpt2"),
        ("hidden_act", text("gelu"), "gelu"),
        ("hidden_act", Value::Null, "hidden_act"),
        ("hidden_size", Value::Int(0), "hidden_size"),
        ("hidden_size", Value::Int(1 << 40), "hidden_size"),
        ("hidden_size", Value::Float(52.5), "52.5"),
        ("head_dim", Value::Int(21), "even"),
        ("num_key_value_heads", Value::Int(4), "divisor"),
        ("rms_norm_eps", Value::Float(f64::NAN), "rms_norm_eps"),
        ("rope_theta", Value::Float(0.0), "rope_theta"),
        ("rope_scaling", Value::Map(scaled), "llama3"),
        ("rope_scaling", text("linear"), "rope_scaling"),
        ("partial_rotary_factor", Value::Float(0.5), "partial_rotary_factor"),
        ("attention_bias", Value::Bool(true), "attention_bias"),
        ("tie_word_embeddings", Value::Int(1), "tie_word_embeddings"),
        ("vocab_size", Value::Int(38), "model.embed_tokens.weight"),
    ] {
        let error = refused(|config, _| {
            config.0.insert(field.to_owned(), value.clone());
        });
        assert!(error.contains(said), "{field}: {error}");
    }
}

#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let scale = "model.layers.1.mlp.up_proj.weight_scale";
    let trits =
        |rows: usize, cols: usize, t: i8| Owned::Trits(vec![rows, cols], vec![t; rows * cols]);
    let cases: Vec<(&str, Option<Owned>, &str)> = vec![
        (name, None, "missing"),
        (name, Some(trits(100, 51, 0)), "[100, 51]"),
        (name, Some(trits(100, 52, 2)), "row 0 holds 2"),
        (scale, None, "weight_scale"),
        (scale, Some(Owned::Floats(vec![2], vec![1.0; 2])), "[2]"),
        (scale, Some(Owned::Floats(vec![1], vec![f32::INFINITY])), "infinities"),
        (name, Some(Owned::Floats(vec![100, 52], vec![0.5; 5200])), "without"),
    ];
    for (tensor, replacement, said) in cases {
        let replacement = std::cell::RefCell::new(replacement);
        let error = refused(|_, weights| {
            weights.remove(tensor);
            if let Some(owned) = replacement.borrow_mut().take() {
                weights.insert(tensor.to_owned(), owned);
            }
        });
        assert!(error.contains(said) && error.contains("layers.1.mlp.up_proj"), "{error}");
    }
    let error = refused(|_, weights| {
        let bad = vec![f32::NAN; VOCAB * 52];
        let name = "model.embed_tokens.weight".to_owned();
        weights.insert(name, Owned::Floats(vec![VOCAB, 52], bad));
    });
    assert!(error.contains("embed_tokens") && error.contains("NaN"), "{error}");
}
