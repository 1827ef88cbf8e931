"""Runs in an interpreter with torch, transformers and peft: opens a base with an adapter as PEFT does.

    python peer_peft.py BASE ADAPTER IDS.npy LOGITS.npy

Writes the logits with the adapter beside the base, and of the two merged. A tensor that PEFT has no place for, or does
not find, ends it.
"""

import sys
import warnings

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, ids, logits = sys.argv[1:]
warnings.simplefilter("error", UserWarning)
model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    tokens = torch.from_numpy(np.load(ids)).long()
    beside = model(tokens).logits.numpy()
    merged = model.merge_and_unload()(tokens).logits.numpy()
np.save(logits, np.stack([beside, merged]))
