"""Every drafter in one run: no drafter, a draft model (vanilla speculative decoding), n-grams, Medusa heads, hybrids.

specjax run experiments/compare_drafters_smollm2.py
"""

from specjax.experiment import DecodeExperiment, Decoding, Method, Prompts

HEADS, DRAFT = "smollm2-135m-instruct", "smollm2-draft"
DRAFTERS = {  # name -> (drafter, tree)
    "vanilla": ("draft", "chain:2"),
    "draft tree": ("draft", "cartesian:3,1"),
    "ngram": ("ngram", "chain:3"),
    "medusa": ("medusa", "paths:0,1,2,0.0,0.1"),
    "ngram+medusa": ("ngram+medusa", "chain:2+paths:0,1,2,0.0,0.1"),
    "medusa+draft": ("medusa+draft", "paths:0,1,0.0+cartesian:2,1"),
}


def get_config() -> DecodeExperiment:
    methods = []
    for temperature in (0.0, 0.7, 1.0):
        suffix = f"_T{temperature:g}" if temperature else ""
        settings = {"dtype": "float32", "temperature": temperature}
        methods.append(Method("autoregressive" + suffix, **settings))
        methods += [
            Method(name + suffix, heads=HEADS, tree=tree, drafter=kind, draft_model=DRAFT, **settings)
            for name, (kind, tree) in DRAFTERS.items()
        ]
    return DecodeExperiment(
        name="compare_drafters_smollm2",
        model="smollm2-135m-instruct",
        methods=tuple(methods),
        prompts=Prompts(per_category=4),
        decoding=Decoding(max_new_tokens=64),
    )
