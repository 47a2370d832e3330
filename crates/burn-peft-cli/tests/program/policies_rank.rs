//! Methods whose policy decides over ranks and factors, through the program: what a training leaves in the
//! file, and that an interrupted one goes on to the same.

use crate::{CLASSIFY, Desk, classify, far, logits};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use std::collections::BTreeMap;

/// A tensor of an adapter's file.
struct Stored {
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// All of them, by name.
fn stored(desk: &Desk, name: &str) -> BTreeMap<String, Stored> {
    let bytes = desk.bytes(&format!("{name}/adapter_model.safetensors"));
    let file = SafeTensors::deserialize(&bytes).expect("is a safetensors file");
    let number = |b: &[u8]| f32::from_le_bytes(b.try_into().expect("has four bytes"));
    let read = |(name, tensor): (String, TensorView<'_>)| {
        let values = tensor.data().chunks(4).map(number).collect();
        (name, Stored { shape: tensor.shape().to_vec(), values })
    };
    file.tensors().into_iter().map(read).collect()
}

/// A training of `method` on queries, keys and values: six places.
fn train(method: &str, options: &[&str]) -> String {
    let options: String = options.iter().map(|o| format!(" --method-option {o}")).collect();
    let line = CLASSIFY.replace("query,value", "query,key,value");
    line.replace("--r 4", &format!("--method {method}{options}"))
}

/// Those of the file whose names end so, by the path of their place.
fn ending<'a>(file: &'a BTreeMap<String, Stored>, end: &str) -> Vec<(&'a str, &'a Stored)> {
    let end = format!(".{end}");
    file.iter().filter_map(|(name, tensor)| Some((name.strip_suffix(&end)?, tensor))).collect()
}

#[test]
fn one_training_serves_every_rank_and_each_is_plain_lora() {
    let desk = classify();
    for (name, frozen) in [("all", false), ("frozen", true)] {
        let line = train("dylora", &["r=4", "lora_alpha=8", &format!("frozen={frozen}")]);
        desk.good(&format!("{line} --max-steps 60 --test-file /test.tsv --output-dir /{name}"));
        let summary = desk.json(&format!("{name}/summary.json"));
        let before = summary["before"]["loss"].as_f64().expect("was measured");
        let file = stored(&desk, name);
        let mut config = desk.json(&format!("{name}/adapter_config.json"));
        for rank in 1..=4 {
            config["rank_at_use"] = rank.into();
            desk.write(&format!("{name}/adapter_config.json"), &config.to_string());
            let eval = format!("eval --model @models/bert --adapter /{name} --test-file /test.tsv");
            let report: Value = serde_json::from_str(&desk.good(&eval)).expect("is JSON");
            let loss = report["loss"].as_f64().expect("was measured");
            assert!(loss < before, "{name} at rank {rank}: {loss} and untrained {before}");
            plain_lora(&desk, &file, &config, rank);
            let forward =
                "forward --model @models/bert --inputs @models/bert/golden.safetensors --output";
            desk.good(&format!("{forward} /a.safetensors --adapter /{name}"));
            desk.good(&format!("{forward} /b.safetensors --adapter /plain"));
            let [a, b] = ["a", "b"].map(|name| logits(&desk, &format!("{name}.safetensors")));
            assert_eq!(a, b, "{name} at rank {rank}");
        }
    }
}

/// Writes the first ranks of a DyLoRA file as an adapter of LoRA's, in the folder `plain`.
fn plain_lora(desk: &Desk, file: &BTreeMap<String, Stored>, config: &Value, rank: usize) {
    let mut tensors = BTreeMap::new();
    for (name, Stored { shape, values }) in file {
        // (r, fan_in) and (fan_out, r), as PyTorch stores them.
        let (name, shape, values) = match name.rsplit_once('.') {
            Some((path, "dylora_A")) => {
                let part = values[..rank * shape[1]].to_vec();
                (format!("{path}.lora_A.weight"), vec![rank, shape[1]], part)
            }
            Some((path, "dylora_B")) => {
                let rows = values.chunks(shape[1]);
                let part = rows.flat_map(|row| row[..rank].to_vec()).collect();
                (format!("{path}.lora_B.weight"), vec![shape[0], rank], part)
            }
            _ => (name.clone(), shape.clone(), values.clone()),
        };
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        tensors.insert(name, (shape, bytes));
    }
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).expect("fits"))
    });
    let bytes = safetensors::serialize(views, None).expect("can be written");
    let mut config = config.clone();
    let fields = config.as_object_mut().expect("is an object");
    for field in ["r_min", "frozen", "rank_at_use", "rank_seed"] {
        assert!(fields.remove(field).is_some(), "{field}");
    }
    fields.insert("peft_type".into(), "LORA".into());
    fields.insert("r".into(), rank.into());
    std::fs::create_dir_all(desk.path("plain")).expect("makes a folder");
    std::fs::write(desk.path("plain/adapter_model.safetensors"), bytes).expect("writes");
    desk.write("plain/adapter_config.json", &config.to_string());
}

#[test]
fn closed_gates_are_not_in_the_file() {
    let desk = classify();
    let line = train("sora", &["r=6", "sparse_lambda=3"]);
    desk.good(&format!("{line} --max-steps 60 --output-dir /out"));
    let config = desk.json("out/adapter_config.json");
    let pattern = config["gate_pattern"].as_object().expect("was decided");
    let file = stored(&desk, "out");
    let gates = ending(&file, "sora_gate");
    assert_eq!((pattern.len(), gates.len()), (6, 6));
    let mut left = 0;
    for (name, gate) in gates {
        let (_, mask) = pattern.iter().find(|(path, _)| name.ends_with(*path)).expect("is there");
        let mask = mask.as_array().expect("is a mask");
        assert_eq!(mask.len(), 6);
        let kept = mask.iter().filter(|kept| **kept == true).count();
        assert_eq!(gate.shape, [kept], "{name}");
        assert_eq!(file[&format!("{name}.sora_A")].shape[0], kept, "{name}");
        assert_eq!(file[&format!("{name}.sora_B")].shape[1], kept, "{name}");
        assert!(kept == 1 || gate.values.iter().all(|g| *g != 0.0), "{name}: {:?}", gate.values);
        left += kept;
    }
    assert!((7..36).contains(&left), "{left} of 36 are left");
    desk.good("predict --model @models/bert --adapter /out --text w1");
    desk.good("merge --model @models/bert --adapter /out --output-dir /merged");
    let forward = "forward --inputs @models/bert/golden.safetensors --output";
    desk.good(&format!("{forward} /a.safetensors --model @models/bert --adapter /out"));
    desk.good(&format!("{forward} /b.safetensors --model /merged"));
    let [a, b] = ["a", "b"].map(|n| logits(&desk, &format!("{n}.safetensors")));
    let far = far(&a, &b);
    assert!(far < 1e-4, "merged differs by {far}");
    // Without the pull to zero, all are left.
    let line = train("sora", &["r=6", "sparse_lambda=0"]);
    desk.good(&format!("{line} --max-steps 60 --output-dir /dense"));
    let file = stored(&desk, "dense");
    assert!(ending(&file, "sora_gate").iter().all(|(_, gate)| gate.shape == [6]));
}

#[test]
fn ranks_grow_to_the_budget_and_the_file_holds_those() {
    let desk = classify();
    let growth = ["target_r=2", "max_r=4", "incre_interval=5", "top_h=2"];
    for (steps, total) in [(9, 8), (60, 12)] {
        let line = train("increlora", &growth);
        desk.good(&format!("{line} --max-steps {steps} --overwrite --output-dir /out"));
        let config = desk.json("out/adapter_config.json");
        let pattern = config["rank_pattern"].as_object().expect("was decided");
        let file = stored(&desk, "out");
        let all = ending(&file, "increlora_E");
        assert_eq!((pattern.len(), all.len()), (6, 6));
        let mut ranks = Vec::new();
        for (name, e) in all {
            let (_, rank) =
                pattern.iter().find(|(path, _)| name.ends_with(*path)).expect("is there");
            let rank = usize::try_from(rank.as_u64().expect("is a rank")).expect("is small");
            assert_eq!(e.shape, [rank], "{name}");
            assert_eq!(file[&format!("{name}.increlora_A")].shape[0], rank, "{name}");
            assert_eq!(file[&format!("{name}.increlora_B")].shape[1], rank, "{name}");
            ranks.push(rank);
        }
        // One each at first, two more every five steps, and two a place in the end.
        assert_eq!(ranks.iter().sum::<usize>(), total, "{ranks:?}");
        assert!(ranks.iter().all(|rank| (1..=4).contains(rank)), "{ranks:?}");
        assert!(ranks.iter().any(|rank| *rank != 2), "{ranks:?}");
    }
    desk.good("predict --model @models/bert --adapter /out --text w1");
}

#[test]
fn frozen_factors_do_not_move_any_more() {
    let desk = classify();
    let line = train("aflora", &["r=4", "total_step=30", "tfinal=15"]);
    let line = format!("{line} --lr-scheduler-type constant --weight-decay 0.1");
    for steps in [8, 15, 30] {
        desk.good(&format!("{line} --max-steps {steps} --output-dir /at{steps}"));
    }
    let [early, middle, end] = [8, 15, 30].map(|steps| stored(&desk, &format!("at{steps}")));
    let moved = |from: &BTreeMap<String, Stored>, to: &BTreeMap<String, Stored>, name: &str| {
        let all = ending(from, name);
        assert_eq!(all.len(), 6);
        let differs = |(path, tensor): &(&str, &Stored)| {
            tensor.values != to[&format!("{path}.{name}")].values
        };
        all.iter().filter(|pair| differs(pair)).count()
    };
    for factor in ["aflora_A", "aflora_B"] {
        assert_eq!(moved(&middle, &end, factor), 0, "{factor} is frozen from step 15 on");
    }
    for scale in ["aflora_s_d", "aflora_s_b"] {
        assert_eq!(moved(&middle, &end, scale), 6, "{scale} is trained to the end");
    }
    // 12·(1 - (6/15)³) = 11.2: all but one are frozen before step 9 moves them.
    let still = moved(&early, &middle, "aflora_A") + moved(&early, &middle, "aflora_B");
    assert_eq!(still, 1);
}

#[cfg(unix)]
mod resumed {
    use crate::{CLASSIFY, LONG, interrupted};

    fn check(method: &str) {
        interrupted(&format!("{CLASSIFY} {LONG}").replace("--r 4", method), "--lora-alpha 3");
    }

    #[test]
    fn the_ranks_of_dylora_are_drawn_the_same_again() {
        check("--method dylora --method-option r=4 --method-option frozen=true");
    }

    #[test]
    fn the_gates_of_sora_close_the_same_again() {
        check("--method sora --method-option r=4 --method-option sparse_lambda=0.8");
    }

    #[test]
    fn increlora_grows_the_same_again() {
        check(
            "--method increlora --method-option target_r=3 --method-option max_r=4 \
             --method-option incre_interval=15 --method-option top_h=1",
        );
    }

    #[test]
    fn aflora_freezes_the_same_again() {
        check("--method aflora --method-option r=4 --method-option tfinal=100");
    }
}
