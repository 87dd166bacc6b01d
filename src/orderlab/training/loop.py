"""The training loop: one step, and what is due after it (a report, a validation, a checkpoint), in the manner of NVlabs/edm2.

The loop knows no model, only an objective: what a batch is, its loss, its validation (`objectives.py`). Progress is counted in
images seen. Batches, orders, label drops and the learning rate are functions of (seed, images seen); dropout alone uses the
global stream, re-seeded before every micro-step from (seed, images seen, rank, micro-step). So the same command in the same
folder goes on where it stopped, bit for bit on the same number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orderlab.config import RunConfig, UserError
from orderlab.data.tokens import token_sets
from orderlab.runtime.dist import World, autocast, key, whole, world
from orderlab.runtime.run import RunFolder, StopSignal, read_state, save_state
from orderlab.training.objectives import Batch, Objective, load_start, objective_for
from orderlab.training.optim import Loss, accumulating, adamw, is_sharded, learning_rate, moving_average, prepare
from orderlab.training.speed import Speed

Report = Callable[[dict[str, Any]], None]
REPORTS_PER_RUN = 200
STATE = "state.safetensors"


def run(config: RunConfig, run_dir: str | Path, *, cache: Path | None = None, report: Report | None = None) -> str:
    """Train `config` in `run_dir` until done or told to stop; returns the state: "trained" or "stopped".

    `cache` holds token sets made from images (default: `tokens/` beside the run's recipe folder). `report` receives each
    record of metrics.jsonl as it is written. Raises `UserError` for a folder of another config or in use, and for a loss
    that is not finite.
    """
    folder = RunFolder(run_dir)
    with world() as here, folder.lock() if here.is_main else nullcontext():
        if here.is_main:
            folder.check(config)
            token_sets(config.data, config.model.grid, cache or folder.cache)  # made once, found by the other processes
        here.barrier()
        objective = objective_for(config, cache or folder.cache, here.device, folder.runs)
        if not (folder.checkpoints / STATE).exists():
            load_start(objective)
        if here.is_main:
            folder.create(config)  # the folder is this config's once all that it needs was there
        here.barrier()
        state = Trainer(config, folder, objective, here, report).train()
        here.barrier()  # what the first process wrote is there for all
        return state


class Trainer:
    """One run on one process: its optimizer, moving average and images seen, and the sums between two reports."""

    def __init__(self, config: RunConfig, folder: RunFolder, objective: Objective[Any], here: World, report: Report | None = None):
        self.config, self.folder, self.objective, self.here, self.report = config, folder, objective, here, report
        self.model = objective.model
        self.ema = moving_average(self.model, config)
        self.state_file = folder.checkpoints / STATE
        state = read_state(self.state_file) if self.state_file.exists() else None
        if state is not None:
            state.load_weights(self.model, self.ema)
        self.loss = prepare(Loss(self.model, objective.loss), self.ema, config, here)
        self.optimizer = adamw(self.model, config.optim, objective.rate_scales)
        if state is not None:
            state.load_moments(self.model, self.optimizer)
        self.images = state.images if state is not None else 0
        self.batches = Batches(objective.batch, here.rows(config.batch), here.device, config.batch, config.images)
        self.share = config.batch // here.size  # this process's images of a step
        self.micro_batch = min(config.micro_batch or self.share, self.share)
        self.is_writing = here.is_main or is_sharded(config, here)  # all gather the parts of split weights, the first writes
        self.loss_sum = torch.zeros((), device=here.device, dtype=torch.float64)
        self.bad_step = torch.full((), -1, device=here.device)
        self.grad_norms: dict[str, Tensor] = {}
        self.steps_since_report = 0
        self.speed = Speed(config, here)

    def train(self) -> str:
        """Step, and do what is then due, until the run is done or told to stop."""
        config, here = self.config, self.here
        if self.images >= config.images and self.folder.status()["state"] == "trained":
            return "trained"
        if here.is_main:
            self.folder.rewind(self.images)  # forget records of steps that a killed process took after its last checkpoint
        self.objective.resume(self.folder)
        report_every = max(1, config.steps // REPORTS_PER_RUN)
        with StopSignal() as stop:
            is_stopped = here.any(stop.received)
            while self.images < config.images and not is_stopped:
                self.step()
                is_done, is_stopped = self.images >= config.images, here.any(stop.received)
                is_save = is_done or is_stopped or self._is_due(config.checkpoint_every)
                if is_save or self.images // config.batch % report_every == 0:
                    self._report()
                if is_done or self._is_due(config.validate_every):
                    with self.speed.paused():
                        self._record({"kind": "validation", "images": self.images, **self.objective.validate()})
                for name, end in config.phase_ends.items():
                    if self.images - config.batch < end <= self.images:
                        with self.speed.paused():
                            self._export(name, {"images": str(self.images)}, self.model)
                if is_save:
                    with self.speed.paused():
                        self._save()
            if self.images < config.images:
                stop.agree()
                self._set_status("stopped")
                return "stopped"
            header = {"run": config.model_dump_json(), "images": str(self.images)}
            self._export("final", header, self.model)  # the headline
            if self.ema is not None:
                self._export("final-ema", header, self.ema.module)
            self._set_status("trained")
            return "trained"

    def step(self) -> None:
        """Train on one global batch: draw it, pass forward and backward in micro-batches, clip, update, average."""
        config, here = self.config, self.here
        batch = self.batches.at(self.images)  # images, labels (some dropped) and orders: the objective drew them by `images`
        micro_steps = -(-self.share // self.micro_batch)
        loss_sum = torch.zeros_like(self.loss_sum)
        self.loss.train()
        for micro_step in range(micro_steps):
            torch.manual_seed(key("dropout", config.seed, self.images, here.rank, micro_step))
            part = batch.part(slice(micro_step * self.micro_batch, (micro_step + 1) * self.micro_batch))
            with accumulating(self.loss, is_last=micro_step == micro_steps - 1):
                with autocast(config.precision, here.device):
                    loss = self.loss(part) * (len(part.classes_B) / self.share)  # the objective's, of the model's logits
                loss.backward()
            loss_sum += loss.detach()
        self.grad_norms = self.objective.clip()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.images) * group["lr_scale"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        # Sums and the first step that was not finite stay on the device, so that no step waits for it.
        is_bad = ~(torch.isfinite(loss_sum) & torch.isfinite(self.grad_norms["grad_norm"]))
        self.bad_step = torch.where(is_bad & (self.bad_step < 0), self.images // config.batch, self.bad_step)
        self.loss_sum += loss_sum
        self.steps_since_report += 1
        self.images += config.batch
        self.objective.stepped(self.images)

    def _is_due(self, every: int) -> bool:
        """True at the first step boundary at or past each multiple of `every` images."""
        return every > 0 and self.images // every > (self.images - self.config.batch) // every

    def _report(self) -> None:
        """Record the mean loss since the last report, the state of the last step, and what the objective says of each step."""
        self._stop_on_nan()
        steps, before = self.steps_since_report, self.images - self.config.batch
        self._record(
            {
                "kind": "train",
                "images": self.images,
                "loss": float(self.here.mean(self.loss_sum / steps)),
                **{name: float(norm) for name, norm in self.grad_norms.items()},
                "lr": learning_rate(self.config, before),
                **self.speed.record(steps * self.config.batch, self.config.images - self.images),
                **self.objective.logs(before),
            }
        )
        for record in self.objective.step_records(self.here):
            self._record(record)
        self.loss_sum.zero_()
        self.steps_since_report = 0

    def _stop_on_nan(self) -> None:
        bad_step = int(self.bad_step)
        if self.here.any(bad_step >= 0):
            self._set_status("failed", reason=f"the loss was not finite at step {bad_step}")
            raise UserError(
                f"the loss or its gradient was not finite at step {bad_step} ({self.folder.root}); "
                "the last checkpoint is whole: lower optim.lr or check the data, in a new --runs folder"
            )

    def _save(self) -> None:
        self._stop_on_nan()
        if self.is_writing:
            save_state(self.state_file, self.model, self.ema, self.optimizer, self.images, is_writer=self.here.is_main)
        self._set_status("training")

    def _export(self, name: str, header: dict[str, str], module: nn.Module) -> None:
        self._stop_on_nan()
        state = {name: whole(tensor.detach()).cpu() for name, tensor in module.state_dict().items()} if self.is_writing else {}
        if self.here.is_main:
            self.objective.export(self.folder.checkpoints / f"{name}.safetensors", header, state)

    def _set_status(self, state: str, **more: Any) -> None:
        if self.here.is_main:
            self.folder.set_status(state, self.images, of=self.config.images, **more)

    def _record(self, record: dict[str, Any]) -> None:
        if self.here.is_main:
            self.folder.record(record)
            if self.report is not None:
                self.report(record)


class Batches:
    """This process's rows of each global batch, on its device.

    For a GPU a thread draws the next batch while the device works on this one: it reads the memory map, draws the orders and pins
    the pages. A batch is a function of images seen alone, so it is the same batch. On a CPU the thread would only take time from
    the step.
    """

    def __init__(self, draw: Callable[[int], Batch], rows: slice, device: torch.device, step: int, end: int, is_ahead: bool | None = None):
        """`draw(images_seen)` gives the global batch; `step` images lie between two, none begins at `end` or later."""
        self.draw, self.rows, self.device, self.step, self.end = draw, rows, device, step, end
        is_ahead = device.type == "cuda" if is_ahead is None else is_ahead
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if is_ahead else None
        self.next: tuple[int, Future[Batch]] | None = None

    def at(self, images_seen: int) -> Batch:
        """The batch that follows `images_seen`; the copy to the device is under way when this returns."""
        if self.pool is None:
            return self._own(images_seen).to(self.device)
        if self.next is None or self.next[0] != images_seen:
            self.next = images_seen, self.pool.submit(self._own, images_seen)
        batch = self.next[1].result()
        upcoming = images_seen + self.step
        self.next = (upcoming, self.pool.submit(self._own, upcoming)) if upcoming < self.end else None
        return batch.to(self.device)

    def _own(self, images_seen: int) -> Batch:
        batch = self.draw(images_seen).part(self.rows)
        return batch.pinned() if self.device.type == "cuda" else batch
