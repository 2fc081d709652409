"""MODEL ADAPTER -> the logits [12, V] of tokens 3 .. 14 by peft and transformers, as JSON."""

import json
import sys

import peft
import torch
import transformers

model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = peft.PeftModel.from_pretrained(model, sys.argv[2]).eval()
with torch.no_grad():
    print(json.dumps(model(torch.arange(3, 15)[None]).logits[0].tolist()))
