#!/usr/bin/env bash
# TRL 1.16.0: GRPOTrainer's log-probabilities of a GPT-2 are wrong for every prompt that is padded.
#
# Guess: the trainer hands `position_ids` to the model, or transformers derives them from the attention mask as
# `generate` does, so that padding on the left changes nothing.
# Seen: it does neither in the forward pass of the loss. Rotary positions are relative, and a Llama does not notice.
# GPT-2 has learnt positions: the padding counts, and log-probabilities (old, current and the reference's alike) are off
# by several nats. Ratios stay 1 on the first update, so nothing shows it: the policy that is trained is not the one that
# sampled.
#
# Output seen (torch 2.13.0, transformers 5.23.0, trl 1.16.0; random weights):
#   GPT2LMHeadModel: 5 columns of padding change log-probabilities by more than 1: True
#   LlamaForCausalLM: 5 columns of padding change log-probabilities by more than 1: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 trl==1.16.0 torch==2.13.0
cat > "$folder/show.py" <<'PY'
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

words = {"<pad>": 0, "<eos>": 1, **{letter: i + 2 for i, letter in enumerate("abcdefghijklmnop")}}
inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
sizes = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}
for name, size in sizes.items():
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=18, initializer_range=0.3, pad_token_id=0, eos_token_id=1, **size)
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_config(config),
        lambda completions, **_: [0.0] * len(completions),
        GRPOConfig(sys.argv[1], use_cpu=True, bf16=False, per_device_train_batch_size=8, report_to="none"),
        train_dataset=Dataset.from_list([{"prompt": "abc"}] * 8),
        processing_class=tokenizer,
    )
    ids = torch.tensor([[2, 3, 4, 5, 6, 7, 8, 9]])  # a prompt of three tokens, a response of five
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    with torch.no_grad():
        alone = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 5)[0]
        behind = trainer._get_per_token_logps_and_entropies(trainer.model, padded, mask, 5)[0]
    moved = bool((alone - behind).abs().max() > 1)
    print(f"{type(trainer.model).__name__}: 5 columns of padding change log-probabilities by more than 1: {moved}")
PY
TRL_EXPERIMENTAL_SILENCE=1 "$folder/venv/bin/python" "$folder/show.py" "$folder/out" 2> "$folder/log" | tee "$folder/output" || cat "$folder/log"
diff <(grep '^#   ' "$0" | sed 's/^#   //') "$folder/output" && echo "as described"
