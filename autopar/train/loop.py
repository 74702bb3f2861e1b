"""The loop: epochs, steps, validation, and what is done between steps. There is one; front-ends differ in who builds its parts.
Must not know how parts are built, nor how a window goes through the model (gradients.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopar.errors import ConfigError
from autopar.runtime.faults import listed
from autopar.train import events
from autopar.train.data import Feed, Window, batch_size, checksum
from autopar.train.exchange import Exchange
from autopar.train.gradients import AggregatedOutputs, evaluating, everywhere, losses_of, not_finite
from autopar.train.metrics import TrainStepMetrics, ValMetrics
from autopar.train.state import randomness_kept

if TYPE_CHECKING:
    from autopar.train.core import Core

log = logging.getLogger("autopar.train")
# The numbers that a rank tells the others in a step. Those of data are told by the first rank of each scale unit alone; how many micro
# batches come next by all, so that a step needs no agreement of its own.
LOSS, BATCHES, SAMPLES, TOKENS, NEXT, BAD, SIGNAL, WIDTH = range(8)


class Loop:
    """Trains from where trainer.train_status is to the limits of the run.

    .signal: what has interrupted it, or 0. .steps_per_epoch: None where loaders have no length.
    """

    def __init__(self, trainer: Core):
        self.trainer, self.spec, self.events = trainer, trainer.spec, trainer.events
        self.model, self.optimizer, self.scheduler = trainer.model, trainer.optimizer, trainer.lr_scheduler
        self.passes, self.gradients, self.status = trainer.passes, trainer.gradients, trainer.train_status
        self.feed: Feed = trainer.feeds["train"]
        self.val_feed: Feed | None = trainer.feeds.get("val")
        self.exchange = Exchange(trainer.mesh, WIDTH)
        self.first = trainer.mesh.device_index == 0  # of its scale unit
        self.signal = 0
        self.steps_per_epoch: int | None = None
        self._saves_on_interrupt = self.spec.checkpoint.save_on_interrupt and not self.spec.checkpoint.no_save
        self._per_step = self.scheduler is not None and self.spec.lr_interval == "step"
        self._clips_early = False
        self._row = [0.0] * WIDTH
        self._train_loss = math.nan
        self._val_loss: float | None = None
        self._validated = self._saved = -1  # after so many finished steps

    # -- training

    def measure(self) -> None:
        """Learn from all ranks how long an epoch is. NB: collective."""
        row = [0.0] * WIDTH
        row[0], row[1] = self.feed.length(), -1 if self.val_feed is None else self.val_feed.length()
        told = self.exchange(row)
        rows = told[:, 0].tolist()
        if told[:, 1].max() == 0:
            raise ConfigError(
                f"the validation set is empty: its loader gives no batch of {self.spec.micro_batch_size} samples on any rank; "
                f"leave out dataset.val_args to train without one"
            )
        self.steps_per_epoch = None if min(rows) < 0 else math.ceil(max(rows) / self.feed.size)
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"an epoch has no step: the training loader gives no batch of {self.spec.micro_batch_size} samples on any rank; "
                f"use more data, a smaller micro_batch_size, or no drop_last"
            )
        if self.steps_per_epoch == 1 and max(rows) < self.feed.size and self.trainer.rank == 0:
            log.warning(
                "an epoch has %d micro batches per scale unit, fewer than the %d of a step: every step is a mean over fewer samples",
                max(rows), self.feed.size,
            )  # fmt: skip

    def total_steps(self) -> int | None:
        """The step that training ends with, as far as that is known."""
        limits = [self.spec.max_train_steps] if self.spec.max_train_steps is not None else []
        if self.spec.max_epochs is not None and self.steps_per_epoch is not None:
            epoch, idx = self.status.position(self.steps_per_epoch)
            left = (self.spec.max_epochs - epoch) * self.steps_per_epoch - idx
            limits.append(self.status.finished_train_steps + max(0, left))
        return min(limits, default=None)

    def over(self) -> bool:
        """Whether no step is left."""
        return self._next() is None

    def run(self) -> None:
        self.events.emit(events.TrainStart)
        # Gradients are clipped while the ranks' numbers travel, where neither needs the other and nobody hears in which order it is done.
        heard = self.events.heard(events.TrainAggregated, events.BeforeClip, events.AfterClip)
        self._clips_early = self.gradients.early and self.trainer.aggregate_outputs_fn is None and not heard
        self.model.train()
        while (place := self._next()) is not None:
            self.events.emit(events.EpochStart, place[0])
            self._epoch(*place)
            self.events.emit(events.EpochEnd, place[0])
        self.events.emit(events.TrainEnd)

    def _next(self) -> tuple[int, int] | None:
        """(epoch, step in it), or None where training has come to its end."""
        done, limit = self.status.finished_train_steps, self.spec.max_train_steps
        epoch, idx = self.status.position(self.steps_per_epoch)
        over = self.spec.max_epochs is not None and epoch >= self.spec.max_epochs
        return None if self.signal or over or (limit is not None and done >= limit) else (epoch, idx)

    def _epoch(self, epoch: int, idx: int) -> None:
        window = self._begin(epoch, idx)
        total = self._open(window, epoch, idx)
        ends = total == 0
        while not ends:
            done = self.status.finished_train_steps + 1
            every, limit = self.spec.checkpoint.every_n_train_steps, self.spec.max_train_steps
            save = every is not None and done % every == 0
            last = limit is not None and done >= limit
            # NB: nothing is read ahead of a save: loaders and random states are saved as they are.
            ahead = not (save or last or self.signal)
            following, total = self._step(epoch, idx, window, total, ahead)
            idx += 1
            ends = total == 0 if ahead else idx == self.steps_per_epoch
            stop = bool(self.signal) and (ends or not ahead or not self._saves_on_interrupt)
            self._between(epoch, ends=ends, save=save, final=last or stop, stop=stop)
            if last or stop or ends:
                return
            if ahead:
                window = following
            else:
                window = self.feed.fetch()
                total = self._tell_next(window)
                ends = total == 0
        self._between(epoch, ends=True)  # the epoch had no known length, and was over after the last step already

    def _begin(self, epoch: int, idx: int) -> Window:
        """Open the epoch where it is to go on, with the random states that were saved there."""
        loaded, self.trainer.loaded = self.trainer.loaded, None
        if loaded is not None and idx == 0:
            loaded.restore_rng()  # what draws at the beginning of an epoch has not been drawn yet
        self.feed.begin(epoch, idx * self.feed.size, loaded.dataloader if loaded is not None else None)
        if loaded is not None and idx > 0:
            loaded.restore_rng()
        self.trainer.meter.restart()
        return self.feed.fetch()

    def _open(self, window: Window, epoch: int, idx: int) -> int:
        """Agree on the first window of an epoch: how many micro batches, and that ranks of a unit got the same ones."""
        rows = self.exchange([window.real, self.feed.length(), checksum(window), 0, 0, 0, 0])
        counts, lengths, sums = rows[:, 0], rows[:, 1].tolist(), [int(x) for x in rows[:, 2].tolist()]
        size = self.trainer.mesh.unit_size
        for start in range(0, len(sums), size):
            if len(set(sums[start : start + size])) > 1:
                ranks = listed(range(start, start + size))
                raise everywhere(
                    f"{ranks} form one scale unit, but the first batches of epoch {epoch} differ between them; ranks of a unit train on "
                    f"the same data: shard by scale unit (rank // {size}), and seed what shuffles alike on every rank"
                )
        firsts = sums[::size]
        if len(firsts) > 1 and len(set(firsts)) == 1 and firsts[0] and not getattr(self, "_warned", False) and self.trainer.rank == 0:
            self._warned = True
            log.warning("all scale units train on the same first batches; a loader without a sampler has to shard its data by itself")
        self.steps_per_epoch = None if min(lengths) < 0 else math.ceil(max(lengths) / self.feed.size)
        self.status.anchor(epoch, idx, self.steps_per_epoch)
        total = self._total(counts)
        if total == 0 and idx == 0:
            raise ConfigError(f"epoch {epoch} has no batch on any rank; there is nothing to train on")
        return total

    def _tell_next(self, window: Window) -> int:
        row = [0.0] * WIDTH
        row[NEXT] = window.real
        return self._total(self.exchange(row)[:, NEXT])

    def _total(self, counts: Tensor) -> int:
        """Of the micro batches that every rank has next, those of all scale units."""
        size = self.trainer.mesh.unit_size
        if size > 1 and not torch.equal(counts, counts[::size].repeat_interleave(size)):
            said = ", ".join(f"{int(n)} on rank {r}" for r, n in enumerate(counts.tolist()))
            raise everywhere(f"ranks of one scale unit have different numbers of batches left: {said}; they have to read the same data")
        return int(counts[::size].sum())

    def _step(self, epoch: int, idx: int, window: Window, total: int, ahead: bool) -> tuple[Window | None, int]:
        """One optimizer step; returns the window after it, if it may be read already, and its number of micro batches on all units."""
        emit, gradients = self.events.emit, self.gradients
        emit(events.StepStart, epoch, idx)
        gradients.zero()
        emit(events.TrainStepStart, window.data)
        outputs = self.passes.train(window, gradients.scale_before(total))[: window.real]
        emit(events.TrainStepEnd, outputs)
        following = self.feed.fetch() if ahead else None  # while the device still works
        losses = self._tell(outputs, window, following)
        gnorm = gradients.clip().item() if self._clips_early else None
        aggregated, told = self._aggregate(outputs, losses)
        self._train_loss = loss = _reduced(aggregated, self.spec.loss_reduction)
        emit(events.TrainAggregated, aggregated, loss)
        if gnorm is None:
            gradients.scale_after(aggregated)
            gnorm = gradients.clip().item()
        if self.spec.check_finite and not math.isfinite(gnorm):
            raise gradients.explain(gnorm, self.passes, window, self.status.finished_train_steps + 1)
        lr = self.optimizer.param_groups[0]["lr"]
        gradients.step()
        if self._per_step:
            self._step_scheduler(loss)
        self.status.finished_train_steps += 1
        self._log_step(TrainStepMetrics(loss, gnorm, float(lr), epoch), aggregated, told)
        emit(events.StepEnd, epoch, idx, self._metrics, aggregated)
        return following, int(told[NEXT])

    def _tell(self, outputs: list[Any], window: Window, following: Window | None) -> list[float]:
        """Begin to tell the other ranks of this one's step; the losses."""
        losses = losses_of(outputs)
        row = self._row
        if self.first:
            row[:NEXT] = (sum(losses), window.real, window.samples, window.tokens)
        row[NEXT] = 0 if following is None else following.real
        row[BAD] = not_finite(losses) if self.spec.check_finite else 0
        row[SIGNAL] = self.trainer.interrupts.requested
        self.exchange.begin(row)
        return losses

    def _aggregate(self, outputs: list[Any], losses: list[float]) -> tuple[AggregatedOutputs, list[float]]:
        """The step's outputs of all ranks put together; and the sums of what ranks have told, for data over the scale units."""
        rows = self.exchange.end()
        told = rows.sum(0).tolist()
        if self.trainer.mesh.unit_size > 1:
            told[NEXT] = self._total(rows[:, NEXT])
        if told[BAD]:
            self._stop_for(rows[:, BAD].tolist(), losses)
        if told[SIGNAL] and not self.signal:
            self.signal = int(rows[:, SIGNAL].max())
        custom = self.trainer.aggregate_outputs_fn
        if custom is not None:
            return custom(outputs, self.trainer.sync_group), told
        return AggregatedOutputs(told[LOSS], int(told[BATCHES]), int(told[TOKENS]) or None), told

    def _stop_for(self, bad: Sequence[float], losses: list[float]) -> None:
        ranks = [r for r, index in enumerate(bad) if index]
        which = ", ".join(sorted({f"{int(bad[r]) - 1}" for r in ranks}))
        mine = int(bad[self.trainer.rank])
        value = f" ({losses[mine - 1]} here)" if mine else ""
        raise everywhere(
            f"step {self.status.finished_train_steps + 1}: the loss of micro batch {which} is not finite on {listed(ranks)}{value}. "
            f"No rank has changed a parameter in this step"
        )

    def _log_step(self, metrics: TrainStepMetrics, aggregated: AggregatedOutputs, told: list[float]) -> None:
        t = self.trainer
        metrics.add(t.meter.step(tokens=told[TOKENS] or None, samples=told[SAMPLES]))
        self._metrics = metrics
        self.events.emit(events.BeforeLogTrain, metrics, aggregated)
        if t.loggers:
            t.loggers.log_metrics(metrics.to_dict(), self.status.finished_train_steps, tag="train")
        t.profiler.step(self.status.finished_train_steps)

    # -- between steps

    def _between(self, epoch: int, *, ends: bool, save: bool = False, final: bool = False, stop: bool = False) -> None:
        """Validation, schedule and saving after a step, where they are due.

        ends: the epoch is over. final: training is. stop: a signal ended it; a checkpoint is written without validation, time is short.
        """
        c, spec, done = self.spec.checkpoint, self.spec, self.status.finished_train_steps
        final = final or (ends and spec.max_epochs is not None and epoch + 1 >= spec.max_epochs)
        save = (save or (ends and _due(c.every_n_epochs, epoch + 1)) or final) and not c.no_save and self._saved != done
        if stop:
            self.events.emit(events.Interrupted, self.signal)
            save = save and c.save_on_interrupt
        validate = save or _due(spec.val_every_n_train_steps, done) or (ends and _due(spec.val_every_n_epochs, epoch + 1))
        if validate and not stop:
            self.validate()
        if ends:
            if self.scheduler is not None and spec.lr_interval == "epoch":
                self._step_scheduler(self._train_loss if self._val_loss is None else self._val_loss)
            self.status.anchor(epoch + 1, 0, self.steps_per_epoch)
        if save:
            self._saved = done
            self.trainer.save(epoch, self._val_loss if self._validated == done else None, ended=ends)
        if validate or save:
            self.trainer.meter.restart()

    def _step_scheduler(self, loss: float) -> None:
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(loss)
        else:
            self.scheduler.step()

    # -- validation

    def validate(self) -> float | None:
        """The mean loss over all validation samples of all ranks; the training loss where there is no validation set."""
        done = self.status.finished_train_steps
        if self._validated == done and self._val_loss is not None:
            return self._val_loss
        self._validated = done
        loss = None
        if self.val_feed is not None:
            self.events.emit(events.ValStart)
            with evaluating(self.model), randomness_kept():
                loss = self._validation(self.val_feed)
            if loss is None:
                log.warning("the validation set gave no batch on any rank; val_loss is the training loss")
        if loss is None:
            self._val_loss = None if math.isnan(self._train_loss) else self._train_loss
        else:
            self._val_loss = loss
            metrics = ValMetrics(loss)
            self.events.emit(events.BeforeLogVal, metrics)
            if self.trainer.loggers:
                self.trainer.loggers.log_metrics(metrics.to_dict(), done, tag="val")
        if self.val_feed is not None:
            self.events.emit(events.ValEnd, self._val_loss)
        return self._val_loss

    def _validation(self, feed: Feed) -> float | None:
        feed.begin(0)
        window = feed.fetch()
        row = [0.0] * WIDTH
        most = self._most(window, row)
        total, weight, steps = 0.0, 0.0, 0
        while most and steps != self.spec.max_val_steps:
            self.events.emit(events.ValStepStart, window.data)
            # NB: as many on every rank: under ZeRO-3 units need each other's parameters.
            outputs = self.passes.infer(window.batches[:most])[: window.real]
            self.events.emit(events.ValStepEnd, outputs)
            losses, sizes = losses_of(outputs), [batch_size(b) for b in window.data]
            if self.first:
                row[LOSS] = sum(loss * n for loss, n in zip(losses, sizes, strict=True))
                row[BATCHES], row[SAMPLES], row[TOKENS] = window.real, sum(sizes), window.tokens
            window = feed.fetch()
            most = self._most(window, row)
            told = self.exchange.rows.sum(0).tolist()
            custom = self.trainer.aggregate_outputs_fn
            if custom is not None:
                aggregated = custom(outputs, self.trainer.sync_group)
                loss, n = aggregated.loss_sum, aggregated.num_batches
            else:
                loss, n = told[LOSS], told[SAMPLES]
                aggregated = AggregatedOutputs(loss / n * told[BATCHES], int(told[BATCHES]), int(told[TOKENS]) or None)
            self.events.emit(events.ValAggregated, aggregated, loss / n)
            total, weight, steps = total + loss, weight + n, steps + 1
        return total / weight if weight else None

    def _most(self, window: Window, row: list[float]) -> int:
        """How many micro batches the rank with most of them has next, told together with `row`."""
        row[NEXT] = window.real
        return int(self.exchange(row)[:, NEXT].max())


def _due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0


def _reduced(aggregated: AggregatedOutputs, how: str) -> float:
    return aggregated.loss_sum / aggregated.num_batches if how == "mean" else aggregated.loss_sum
