//! Every method whose difference is one of weights is a LoRA of some rank.

use super::{Case, Law, check};
use crate::probe::close;
use burn::module::Module;
use burn_peft::core::{AdapterConfig, Fold, Folded, Folds, Kind, Method, Scope, Value, load, save};
use burn_peft::reparam::{Lora, Rank, convert};

law!(
    /// At full rank it is the same function, and its file says so.
    what_folds_is_a_lora,
    |case| {
        let adapters = case.trained(1).valid();
        let Some(folds) = Folded::<T>::new(&adapters) else { return };
        let made = convert(&case.sites, &folds, Rank::At(usize::MAX));
        let brings = |adapter| T::fold(adapter).is_some_and(Fold::brings_bias);
        if let Some((path, _)) = adapters.iter().find(|(_, adapter)| brings(*adapter)) {
            let said = made.expect_err("has a bias of its own").to_string();
            assert!(said.contains("bias of its own"), "{} {path}: {said}", case.name);
            return;
        }
        let at = |path: &str| case.sites.get(path).expect("was found by it").clone();
        let scales = |path: &str| match at(path).weight {
            Value::D1(scale) => folds.fold_vector(path, &scale).is_some(),
            _ => false,
        };
        let places = adapters.places();
        if places.iter().any(|path| scales(path)) {
            let said = made.expect_err("scales a norm").to_string();
            assert!(said.contains("no product of two matrices"), "{}: {said}", case.name);
            return;
        }
        let made = made.expect("is a difference of weights");
        let found = case.forward(&Scope::new(&made.adapters));
        close(&found, &case.forward(&Scope::new(&adapters)), &case.name);
        let folder = tempfile::tempdir().expect("makes a folder");
        let config = AdapterConfig::new(made.method);
        save(folder.path(), &config, &case.sites, &made.adapters).expect("is written");
        let (_, again) = load::<Lora>(folder.path(), &case.sites, &case.device).expect("is whole");
        // With a norm's shift all biases are trained, and a place may have nothing that is.
        let changes = |path: &&String| {
            let site = at(path);
            let bias = site.bias.as_ref().and_then(|bias| folds.fold_bias(path, bias));
            bias.is_some() || site.matrix().and_then(|w| folds.fold_weight(path, &w)).is_some()
        };
        if places.iter().all(|path| at(path).kind != Kind::Norm) {
            let changed: Vec<&String> = places.iter().filter(changes).collect();
            assert_eq!(again.places().iter().collect::<Vec<_>>(), changed, "{}", case.name);
        }
        assert_eq!(case.forward(&Scope::new(&again)), found, "{}", case.name);
    }
);

law!(
    /// What is said to be lost at a rank is what is lost.
    the_error_of_a_rank_is_what_is_lost,
    |case| {
        let adapters = case.trained(1).valid();
        let Some(folds) = Folded::<T>::new(&adapters) else { return };
        let Ok(made) = convert(&case.sites, &folds, Rank::At(1)) else { return };
        for fit in &made.fits.0 {
            let w = case.sites.get(&fit.path).and_then(|site| site.matrix()).expect("is a matrix");
            let Some(whole) = folds.fold_weight(&fit.path, &w) else { continue };
            let cut = made.adapters.fold_weight(&fit.path, &w).expect("is adapted");
            let length = |matrix: burn::tensor::Tensor<2>| -> f64 {
                matrix.into_data().iter::<f64>().map(|v| v * v).sum::<f64>().sqrt()
            };
            let (lost, norm) = (length(whole.clone() - cut), length(whole));
            // A few hundred roundings of the whole.
            let bound = 256.0 * f64::from(f32::EPSILON) * norm;
            let far = (fit.residual - lost).abs();
            assert!(far <= bound && (fit.norm - norm).abs() <= bound, "{}: {fit:?}, {lost}", case.name);
        }
    }
);
