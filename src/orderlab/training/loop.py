"""The training loop: report, save, done?, step. It knows no model, only an objective (loss, batch, validation).

Progress is counted in images seen. Batches, orders, label drops and the learning rate are functions of (seed, images seen);
dropout alone uses the global stream, re-seeded before every micro-step from (seed, images seen, rank, micro-step). So the
same command in the same folder goes on where it stopped, bit for bit on the same number of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orderlab.config import RunConfig, UserError
from orderlab.data.tokens import token_sets
from orderlab.runtime.checkpoint import read_state, save_state
from orderlab.runtime.dist import World, autocast, key, world
from orderlab.runtime.run import RunFolder, StopSignal
from orderlab.training.objectives import Batch, Objective, load_start, objective_for
from orderlab.training.optim import Loss, accumulating, adamw, is_sharded, learning_rate, moving_average, prepare, whole_state
from orderlab.training.speed import Speed

# MERGED FROM training.ahead: The next batch is drawn while the device works on this one: a thread reads the memory map, draws orders and pins the pages. A batch is a function of images seen alone, so drawing it early changes nothing. On a CPU the thread would only take time from the step, so it is for GPUs; a test holds both ways equal.


class Batches:
    """This process's rows of each global batch, on its device."""

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


Report = Callable[[dict[str, Any]], None]
REPORTS_PER_RUN = 200
STATE = "state.safetensors"
log = logging.getLogger("orderlab")


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
            load_start(objective, config, folder.runs)
        if here.is_main:
            folder.create(config)  # the folder is this config's once all that it needs was there
        here.barrier()
        state = Trainer(config, folder, objective, here, report or (lambda record: None)).train()
        here.barrier()  # what the first process wrote is there for all
        return state


class Trainer:
    """The state of one run on one process: optimizer, moving average, images seen, and the sums between two reports."""

    def __init__(self, config: RunConfig, folder: RunFolder, objective: Objective[Any], here: World, report: Report):
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
        self.rows = here.rows(config.batch)
        self.batches = Batches(objective.batch, self.rows, here.device, config.batch, config.images)
        micro = config.micro_batch or config.batch // here.size
        self.micro_batch = min(micro, config.batch // here.size)
        self.loss_sum = torch.zeros((), device=here.device, dtype=torch.float64)
        self.bad_step = torch.full((), -1, device=here.device)
        self.grad_norms: dict[str, Tensor] = {}
        self.step_values: list[tuple[int, dict[str, Tensor]]] = []
        self.steps_since_report, self.has_stepped = 0, False
        self.speed = Speed(config, here)

    def train(self) -> str:
        config = self.config
        if self.images >= config.images and self.folder.status()["state"] == "trained":
            return "trained"
        self._rewind_metrics()
        self.objective.remember(self.folder.records("step"))
        report_every = max(1, config.steps // REPORTS_PER_RUN)
        with StopSignal() as stop:
            while True:
                is_done = self.images >= config.images
                is_stopped = self.here.any(stop.received)
                is_save = is_done or is_stopped or self._is_due(config.checkpoint_every)
                if self.steps_since_report and (is_save or self.images // config.batch % report_every == 0):
                    self._report_loss()
                if self.has_stepped and (is_done or self._is_due(config.validate_every)):
                    with self.speed.paused():
                        self._record({"kind": "validation", "images": self.images, **self.objective.validate()})
                if self.has_stepped:
                    self._keep_phase_ends()
                if self.has_stepped and is_save:
                    with self.speed.paused():
                        self._save()
                if is_done:
                    self._finish()
                    return "trained"
                if is_stopped:
                    stop.agree()
                    self._set_status("stopped")
                    return "stopped"
                self._step()

    def _is_due(self, every: int) -> bool:
        """True at the first step boundary at or past each multiple of `every` images."""
        return every > 0 and self.images // every > (self.images - self.config.batch) // every

    def _step(self) -> None:
        """One optimizer step on one global batch: accumulate micro-batches, clip, update, average."""
        config, here = self.config, self.here
        local = self.batches.at(self.images)
        share = self.rows.stop - self.rows.start
        micro_steps = -(-share // self.micro_batch)
        loss_sum = torch.zeros_like(self.loss_sum)
        self.loss.train()
        for micro_step in range(micro_steps):
            torch.manual_seed(key("dropout", config.seed, self.images, here.rank, micro_step))
            rows = slice(micro_step * self.micro_batch, (micro_step + 1) * self.micro_batch)
            part = local.part(rows)
            with accumulating(self.loss, is_last=micro_step == micro_steps - 1):
                with autocast(config.precision, here.device):
                    loss = self.loss(part) * (len(part.classes_B) / share)
                loss.backward()
            loss_sum += loss.detach()
        self.grad_norms = self.objective.clip()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.images) * group["lr_scale"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self._note(loss_sum, self.grad_norms["grad_norm"])
        self.images += config.batch

    def _note(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Remember the loss and the first step at which it or the gradient was not finite, without waiting for the device."""
        step = self.images // self.config.batch
        is_bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        self.bad_step = torch.where(is_bad & (self.bad_step < 0), step, self.bad_step)
        self.loss_sum += loss
        self.step_values.append((self.images + self.config.batch, self.objective.step_values()))
        self.steps_since_report += 1
        self.has_stepped = True

    def _report_loss(self) -> None:
        self._stop_on_nan()
        steps = self.steps_since_report
        loss = float(self.here.mean(self.loss_sum / steps))
        self._record(
            {
                "kind": "train",
                "images": self.images,
                "loss": loss,
                **{name: float(norm) for name, norm in self.grad_norms.items()},
                "lr": learning_rate(self.config, self.images - self.config.batch),
                **self.speed.record(steps * self.config.batch, self.config.images - self.images),
                **self.objective.logs(self.images - self.config.batch),
            }
        )
        self._report_steps()
        self.loss_sum.zero_()
        self.steps_since_report = 0

    def _report_steps(self) -> None:
        """Records of every step since the last report, for tasks that have any, and what the task makes of them."""
        names = list(self.step_values[0][1])
        if names:
            table = torch.stack([torch.stack([values[name].double() for name in names]) for _, values in self.step_values])
            images = [step_images for step_images, _ in self.step_values]
            steps = [dict(zip(names, row)) for row in self.here.mean(table).tolist()]
            for step_images, values in zip(images, steps):
                self._record({"kind": "step", "images": step_images, **values})
            for alert in self.objective.alerts([{"images": at, **values} for at, values in zip(images, steps)]):
                if self.here.is_main and alert["alert"] not in {record["alert"] for record in self.folder.records("alert")}:
                    log.warning("%s: %s", self.folder.root, alert["message"])
                    self._record({"kind": "alert", **alert})
        self.step_values = []

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
        if self.here.is_main or is_sharded(self.config, self.here):
            save_state(self.state_file, self.model, self.ema, self.optimizer, self.images, is_writer=self.here.is_main)
        self._set_status("training")

    def _keep_phase_ends(self) -> None:
        """Export the weights at the first step boundary at or past the end of a phase."""
        for name, images in self.config.phase_ends.items():
            if self.images - self.config.batch < images <= self.images:
                with self.speed.paused():
                    self._stop_on_nan()
                    self._export(name, {"images": str(self.images)}, self.model)

    def _finish(self) -> None:
        """Export the final weights, raw (the headline) and averaged."""
        header = {"run": self.config.model_dump_json(), "images": str(self.images)}
        self._export("final", header, self.model)
        if self.ema is not None:
            self._export("final-ema", header, self.ema.module)
        self._set_status("trained")

    def _export(self, name: str, header: dict[str, str], module: nn.Module) -> None:
        state = whole_state(module) if self.here.is_main or is_sharded(self.config, self.here) else {}
        if self.here.is_main:
            self.objective.export(self.folder.checkpoints / f"{name}.safetensors", header, state)

    def _set_status(self, state: str, **more: Any) -> None:
        if self.here.is_main:
            self.folder.set_status(state, self.images, of=self.config.images, **more)

    def _record(self, record: dict[str, Any]) -> None:
        if self.here.is_main:
            self.folder.record(record)
            self.report(record)

    def _rewind_metrics(self) -> None:
        """Forget records of steps that a killed process took after its last checkpoint."""
        if self.here.is_main:
            self.folder.rewind(self.images)
