"""The benchmark's training as one would write it for a single run: layers, torch.optim.AdamW, a loop over slides."""

import torch
import torch.nn.functional as F

from hpcssl.mccv.metrics import auc
from hpcssl.models.attention import HeadSizes, dropout_scales, initial_weights, unpack
from hpcssl.optim.values import cosine


class PlainHead(torch.nn.Module):
    def __init__(self, sizes, seed):
        super().__init__()
        first, second = sizes.hidden
        self.first, self.second = torch.nn.Linear(sizes.dim, first), torch.nn.Linear(first, second)
        self.tanh, self.sigmoid = (torch.nn.Linear(second, sizes.attention) for _ in range(2))
        self.score, self.classifier = torch.nn.Linear(sizes.attention, 1), torch.nn.Linear(second, sizes.classes)
        start = {name: value[0].T for name, value in unpack(initial_weights(sizes, [seed]), sizes).items()}
        tanh, sigmoid = start["branches"].chunk(2)
        start |= {"tanh": tanh, "sigmoid": sigmoid}
        for name, layer in self.named_children():
            layer.weight.data.copy_(start[name])
            torch.nn.init.zeros_(layer.bias)
        self.widths = [first, second, sizes.attention, sizes.attention]

    def forward(self, x, drop=None):
        first, second, tanh, sigmoid = drop.split(self.widths, dim=1) if drop is not None else [1.0] * 4
        h = torch.relu(self.first(x)) * first
        h = torch.relu(self.second(h)) * second
        gated = torch.tanh(self.tanh(h)) * tanh * torch.sigmoid(self.sigmoid(h)) * sigmoid
        return self.classifier(torch.softmax(self.score(gated).squeeze(1), dim=0) @ h)


def fit_plain(slides, labels, run, preset, seed=0):
    """Return (epoch, metric) → value of one run, slide after slide."""
    sizes = HeadSizes(
        dim=slides[0].shape[1],
        classes=max(labels) + 1,
        hidden=preset.hidden,
        attention=preset.attention,
        dropout=preset.dropout,
    )
    head = PlainHead(sizes, run.key(seed, "weights"))
    weights = [p for name, p in head.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in head.named_parameters() if name.endswith("bias")]
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": biases, "weight_decay": 0.0}])
    total, warmup = preset.epochs * len(run.train), preset.warmup_epochs * len(run.train)
    found, step = {}, 0
    for epoch in range(1, preset.epochs + 1):
        losses = []
        for slide in run.order(seed, epoch):
            lr = cosine(step, base=preset.lr, final=preset.final_lr, total_steps=total, warmup_steps=warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.param_groups[0]["weight_decay"] = cosine(
                step, base=preset.weight_decay, final=preset.final_weight_decay, total_steps=total
            )
            x = torch.from_numpy(slides[slide])
            drop = dropout_scales(sizes, [run.key(seed, "dropout")], [step], [len(x)], len(x))[0]
            loss = F.cross_entropy(head(x, drop), torch.tensor(labels[slide]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
        with torch.no_grad():
            logits = torch.stack([head(torch.from_numpy(slides[i])) for i in run.val])
        targets = torch.tensor([labels[i] for i in run.val])
        found[epoch, "train_loss"] = sum(losses) / len(losses)
        found[epoch, "val_loss"] = F.cross_entropy(logits, targets).item()
        found[epoch, "auc"] = auc(targets.numpy(), logits.double().softmax(dim=1).numpy())
    return found
