"""Medusa-2 for SmolLM2-135M-Instruct: heads and LoRA changes to the backbone, fitted together on its own text.

    specjax run experiments/train_smollm2_medusa2.py --output-dir results/train_smollm2_medusa2

The backbone's loss is its divergence from the frozen model (self-distillation); LoRA of rank 32, alpha 16, dropout
0.05 on all seven matrices of a layer. It uses the text of train_smollm2_medusa.py, and makes it where it is not there.
Output: heads.safetensors and `backbone`, the Hugging Face directory of the model that they belong to, both of the
checkpoint with the most tokens per round on the held-out text; log, TensorBoard events and curves.

On several hosts, each runs the same command with its own number, on directories that all of them see:

    specjax run experiments/train_smollm2_medusa2.py --output-dir DIR --mesh.model 1 \\
        --hosts.coordinator HOST:PORT --hosts.processes 2 --hosts.process-id 0

With `--start-from HEADS` (Medusa-1's, of `train_smollm2_medusa.py` say) it is the second of the paper's two stages.

Record: not run at this size. A small second stage, run to its end, does not pay (2 CPU cores, AMD EPYC Zen 3, jax
0.10.2, float32, beside tests; 27 minutes; the result is in `records`, with the text's directory renamed):

    specjax run experiments/train_smollm2_medusa2.py --dtype float32 --start-from smollm2-135m-instruct \\
        --data.directory results/distill_medusa2 --data.prompts seeds --data.prompt-seed 90000 --data.shards 3 \\
        --data.evaluation-share 0.1 --data.no-features --training.epochs 1 --training.batch-size 2 \\
        --training.length 384 --training.learning-rate 3e-4 --training.no-remat --training.checkpoint-every 45 \\
        --output-dir results/train_smollm2_medusa2

36,919 answer tokens in 71 steps (rows are counted exactly since: it would be some more); 4,137 held out, of 30
conversations. Top-1 accuracy of heads 1 to 4, tokens per round of the tree of 22 nodes, divergence of the backbone from
the frozen target in nats:

    step 0 (the heads that ship)   0.413 0.241 0.171 0.143   1.752   0
    step 45                        0.405 0.219 0.155 0.131   1.734   0.0007
    step 71                        0.404 0.220 0.163 0.124   1.736   0.0008

The heads lose a little; whether by so little text or by their learning rate was not measured. Decoding 16 of the
shipped prompts (64 greedy tokens, a tree of 8 nodes, by a script that was not kept), the exported backbone commits
1.617 tokens a round with its own heads and 1.620 with those that ship, the frozen target with the same 1.575 and
1.594; 9 of the backbone's 16 answers are the frozen target's. On 16 prompts that may be chance.

A first look from the LM head (the same kind of machine, beside other work: seed prompts, 96 answers of up to 96
tokens, 2,048 draft tokens, steps of 2 x 256 tokens, stopped after 30 of them): from step 0 to 30 the heads' held-out
losses fell from 9.8 11.4 12.0 12.0 to 5.6 7.3 8.1 8.0 nats, head 1's top-1 accuracy rose from 0.02 to 0.12, tokens per
round from 1.10 to 1.24 (1.26 at step 20); the backbone diverged from the frozen target by 0.005 nats.
"""

from specjax.corpus.build import Corpus
from specjax.studies.train_packed_medusa import TrainPackedMedusa
from specjax.training.lora import LoraConfig
from specjax.training.packed_medusa import PackedMedusaConfig


def get_config() -> TrainPackedMedusa:
    return TrainPackedMedusa(
        name="train_smollm2_medusa2",
        model="smollm2-135m-instruct",
        data=Corpus(shards=90),
        training=PackedMedusaConfig(
            epochs=2, batch_size=8, length=512, lora=LoraConfig(rank=32, alpha=16.0, dropout=0.05), select="best"
        ),
    )
