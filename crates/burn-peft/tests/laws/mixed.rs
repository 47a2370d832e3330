//! Methods of several families over one model at once.

use crate::hf::{base, device, tokens};
use crate::probe::{Drawn, close, values};
use burn::module::Module;
use burn::optim::GradientsParams;
use burn_peft::additive::{Bottleneck, Ia3, LnTuning};
use burn_peft::core::{Adapters, Method, Overlay, Scope, Sites, Targets, adapt};
use burn_peft::models::{BertForSequenceClassification, Pretrained};
use burn_peft::reparam::Lora;

fn trained<T: Method>(sites: &Sites, method: &T, seed: u64) -> Adapters<T::Adapter> {
    let fresh = adapt(sites, method, seed, &device().autodiff()).expect("fits");
    fresh.map(&mut Drawn::new(seed, 1.0))
}

#[test]
fn families_lie_over_one_model_together() {
    let model: BertForSequenceClassification = base("bert");
    let sites = Sites::of(&model, Some(BertForSequenceClassification::OUTPUT));
    let tokens = tokens("bert", true);
    let to = |name: &str| Targets::list([name]);
    let lora = trained(&sites, &Lora::new(4, 8.0, to("query")), 1);
    let bottleneck = trained(&sites, &Bottleneck::pfeiffer(4.0, to("output")), 2);
    let ia3 = trained(&sites, &Ia3::new(to("query"), []), 3);
    let norms = trained(&sites, &LnTuning::new(to("LayerNorm")), 4);

    let together = (&lora, &bottleneck, &ia3, &norms);
    let y = model.forward(&tokens, &Scope::new(&together));
    let mut gradients = (y.clone() * y.clone()).mean().backward();
    let mut reached = [
        GradientsParams::from_module(&mut gradients, &lora).len(),
        GradientsParams::from_module(&mut gradients, &bottleneck).len(),
        GradientsParams::from_module(&mut gradients, &ia3).len(),
        GradientsParams::from_module(&mut gradients, &norms).len(),
    ];
    reached.iter_mut().zip([4, 16, 2, 10]).for_each(|(found, all)| *found = all - *found);
    assert_eq!(reached, [0; 4], "parameters without a gradient");

    let found = values(y);
    let backwards = (&norms, &ia3, &bottleneck, &lora);
    close(&values(model.forward(&tokens, &Scope::new(&backwards))), &found, "in another order");
    let without: [&dyn Overlay; 4] = [
        &(&bottleneck, &ia3, &norms),
        &(&lora, &ia3, &norms),
        &(&lora, &bottleneck, &norms),
        &(&lora, &bottleneck, &ia3),
    ];
    for (left_out, others) in without.into_iter().enumerate() {
        let other = values(model.forward(&tokens, &Scope::new(&others)));
        let far = found.iter().zip(&other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far > 1e-3, "{left_out} does nothing beside the others: {far}");
    }
}
