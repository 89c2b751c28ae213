"""Which hybrid tree decodes SmolLM2 fastest in bfloat16: measured on other prompts than the demo's.

    specjax run experiments/hybrid_trees_smollm2.py

Twelve trees: n-grams copied at most (3, 4 or 7 after longer matches) beside 3, 4 or 5 Medusa nodes; 10 prompts of 64
tokens. Expect 1.55 to 1.72 tokens a round and speed-ups of 1.15 to 1.31 with AVX-512, which differ less than they
vary.
"""

from specjax.studies.decode import DecodeExperiment, Decoding, Method, Prompts

HEADS = "smollm2-135m-instruct"
MEDUSA = {3: "paths:0,1", 4: "paths:0,1,0.0", 5: "paths:0,1,2,0.0"}  # by number of nodes
CHAINS = ((3, (3,)), (3, (1,)), (7, (1, 3)), (4, (1,)))  # drafts copied at most, and after short matches


def get_config() -> DecodeExperiment:
    methods = [Method("autoregressive")]
    for nodes, tree in MEDUSA.items():
        for length, reach in CHAINS:
            name = f"{length} copied {'-'.join(map(str, reach))}, {nodes} nodes"
            methods.append(
                Method(
                    name, heads=HEADS, drafter="ngram+medusa", tree=f"chain:{length}+{tree}", options={"reach": reach}
                )
            )
    return DecodeExperiment(
        name="hybrid_trees_smollm2",
        model="smollm2-135m-instruct",
        methods=tuple(methods),
        prompts=Prompts(per_category=2, skip=2),
        decoding=Decoding(max_new_tokens=64),
    )
