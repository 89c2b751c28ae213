"""Which hybrid tree decodes SmolLM2 fastest in bfloat16: measured on other prompts than the demo's.

    specjax run experiments/hybrid_trees_smollm2.py

Record (2 CPU cores, AMD EPYC Zen 4 with AVX-512 bf16, jax 0.10.2, bfloat16, nothing else running, with the first heads
(`train_smollm2_medusa.py`); the result is in `records`): 10 prompts of 64 tokens, tokens per round and speed-up, median
(min-max over prompts), by the nodes of the Medusa part (root included) and the drafts copied at most (in brackets those
after a match of one token, and of two):

    copied    3 nodes                  4 nodes                  5 nodes
    3         1.56  1.28 (0.78-1.47)   1.64  1.17 (0.88-1.55)   1.70  1.22 (0.84-1.60)
    3 (1)     1.54  1.21 (0.82-1.47)   1.63  1.17 (0.93-1.63)   1.695 1.26 (0.73-1.58)
    4 (1)     1.56  1.19 (0.92-1.42)   1.66  1.23 (0.85-1.66)   1.72  1.25 (0.80-1.59)
    7 (1, 3)  1.56  1.15 (0.83-1.56)   1.64  1.21 (0.87-1.63)   1.71  1.20 (0.76-1.66)

With the heads that ship, on an Intel Xeon with AVX-512 bf16 but no AMX, nothing else running (`result_xeon.json`):

    3         1.60  1.26 (0.94-1.47)   1.66  1.23 (0.90-1.38)   1.72  1.21 (0.87-1.42)
    3 (1)     1.57  1.29 (0.98-1.53)   1.65  1.28 (0.92-1.46)   1.695 1.20 (0.84-1.44)
    4 (1)     1.59  1.31 (0.97-1.43)   1.66  1.29 (0.87-1.53)   1.71  1.21 (0.85-1.40)
    7 (1, 3)  1.59  1.21 (0.91-1.61)   1.66  1.24 (0.85-1.49)   1.72  1.20 (0.85-1.50)

The candidates are those that looked best when accepted drafts were counted on these prompts and on the demo's, by a
script that was not kept. Their speed-ups differ by less than they vary between prompts. The demo takes 4 (1) beside 5
nodes: on the Zen 4 its median speed-up is the highest of the three that commit more than 1.7 tokens a round, on the
Xeon there is nothing between these three, and smaller trees are faster.
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
