"""Carries out a soak: what the schedule chooses, while every invariant is followed."""

from __future__ import annotations

import re
import time
from typing import Any

from soak.figures import Sampler, table, trends
from soak.invariants import bounds, outcome, progress
from soak.jobs import SoakJob
from soak.look import look
from soak.recipes import RECIPES, Places, body
from soak.records import Records
from soak.rest import REFUSALS, Away, Rest
from soak.schedule import STRIKES, Act, Action, Look, Nothing, ShareFolder, SoakSchedule, Submit, View
from soak.stack import SoakStack, wait_until
from soak.sweep import Sweep
from soak.troubles import Troubles, strikeable
from soak.watcher import Watcher

START_S = 400.0
SWEEP_EVERY_S = 30.0
WIND_DOWN_S = 1500.0
"""How long the open jobs may take to end after the last strike; one that stands still is reported before."""
_TICK_S = 0.5
_STRIKE_ANYWAY_S = 60.0
"""Strikes go on when nothing has moved for so long."""


class Soak:
    """One soak on one stack."""

    def __init__(self, stack: SoakStack, places: Places, records: Records, seed: int) -> None:
        good = [name for name, recipe in RECIPES.items() if recipe.good]
        bad = [name for name, recipe in RECIPES.items() if not recipe.good]
        self.jobs: dict[int, SoakJob] = {}
        self.troubles = Troubles(stack, records)
        self.rest = Rest(stack.gateway_url, records, self.troubles.touched)
        self._stack, self._places, self._records = stack, places, records
        self._schedule = SoakSchedule(seed, strikeable(), good, bad)
        self._progress = progress.Progress()
        self._sweep = Sweep(stack, records)
        self._submitted = 0
        self._moved_s: float | None = None
        """When a job last took a step or ended since the last strike; None: it has not yet."""
        self._struck_s = 0.0

    def run(self, minutes: float) -> str:
        """Soak for so long, let all jobs end, and return the table of figures."""
        wait_until(self._stack.ready, START_S, "the services to start")
        self.troubles.measured(self._records.now_s)
        self._records.note("ready", pace=round(self.troubles.pace, 1))
        with Sampler(self._stack, self._records) as sampler:
            self._loop(self._records.now_s + 60 * minutes)
            self._wind_down()
        self._stop()
        found = trends(sampler.readings)
        for fault in bounds.growth_faults(found):
            self._records.violation("bounds", fault)
        return table(found)

    def _loop(self, end_s: float) -> None:
        next_s = sweep_s = self._records.now_s
        while self._records.now_s < end_s:
            self._tick()
            if self._records.now_s >= next_s:
                self._carry_out(self._schedule.choose(self._view()))
                next_s = self._records.now_s + self._schedule.pause_s() * self.troubles.pace
            if self._records.now_s >= sweep_s:
                self._sweep.run(list(self.jobs.values()), self.troubles.kills, calm=self.troubles.calm)
                sweep_s = self._records.now_s + SWEEP_EVERY_S
            time.sleep(_TICK_S)

    def _wind_down(self) -> None:
        """No more strikes and jobs: everything ends, and is looked at a last time, when nothing may be left."""
        self._records.note("winding down")
        end_s = self._records.now_s + WIND_DOWN_S
        while not self.troubles.calm or any(job.open or not job.checked for job in self.jobs.values()):
            self._tick()
            self._carry_out(self._schedule.wind_down(self._view()))
            if self._records.now_s > end_s:
                left = {job.id: job.state for job in self.jobs.values() if job.open or not job.checked}
                self._records.violation("outcome", f"not ended {WIND_DOWN_S:g} s after the last strike: {left}")
                return
            time.sleep(2 * _TICK_S)
        last_end_s = max((job.ended_s or 0.0 for job in self.jobs.values()), default=0.0)
        wait_until(lambda: self._records.now_s > last_end_s + 100.0, 400.0, "what ended jobs leave to go")
        self._sweep.run(list(self.jobs.values()), self.troubles.kills, calm=True)

    def _stop(self) -> None:
        """Ctrl-C: `miles serve` ends well, and nothing of it stays."""
        code = self._stack.stop(kill=False)
        if code != 0:
            self._records.violation("services", f"miles serve ended with {code} after SIGTERM")
        self._sweep.after_stop()

    def _view(self) -> View:
        jobs = tuple(job.view for job in self.jobs.values())
        moved = self._moved_s is not None or self._records.now_s > self._struck_s + _STRIKE_ANYWAY_S
        return View(self._records.now_s, jobs, self.troubles.calm, moved)

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Nothing):
            return
        self._records.note(type(action).__name__.lower(), action=action)
        if isinstance(action, STRIKES):
            self.troubles.strike(action)
            self._struck_s, self._moved_s = self._records.now_s, None
            return
        try:
            match action:
                case Submit(recipe):
                    self._submit(recipe)
                case Act(number, name):
                    self._act(self.jobs[number], name)
                case Look(number):
                    look(self.jobs[number], self.rest, self._records)
                case ShareFolder(number):
                    self._share_folder(self.jobs[number])
        except Away:
            self._records.note("away", action=action)

    def _submit(self, kind: str) -> None:
        self._submitted += 1
        number, recipe = self._submitted, RECIPES[kind]
        config = body(number, kind, self._places)
        key = {"Idempotency-Key": f"submit-{number}"}
        while True:
            try:
                allowed = frozenset({422}) if not recipe.good else frozenset()
                code, answer = self.rest.send("POST", "/v1/jobs", allowed, json=config, headers=key)
                break
            except Away:
                self._tick()
                time.sleep(_TICK_S)
        if code == 422:
            if re.search(recipe.because, str(answer), re.IGNORECASE) is None:
                self._records.violation("outcome", f"the refusal of {kind} does not say why: {answer}")
            return
        if recipe.refused:
            self._records.violation("outcome", f"{kind} was accepted: {answer['id']}")
        watcher = Watcher(self._stack.gateway_url, answer["id"])
        self.jobs[number] = SoakJob(number, kind, answer["id"], config, watcher)
        self._records.note("submitted", number=number, id=answer["id"])

    def _act(self, job: SoakJob, name: str) -> None:
        # Noted before the answer: an action may take effect though its answer is lost.
        job.asked.add(name)
        code, answer = self.rest.send("POST", f"/v1/jobs/{job.id}/{name}", REFUSALS)
        self._records.note("acted", job=job.id, action=name, code=code, state=answer.get("state"))

    def _share_folder(self, job: SoakJob) -> None:
        config = {**job.body, "name": f"{job.body['name']}-twin"}
        code, answer = self.rest.send("POST", "/v1/jobs", REFUSALS, json=config)
        if code != 409 and not (code == 422 and "run_dir" in str(answer)):
            self._records.violation("outcome", f"a job in the folder of {job.id} was answered {code}: {answer}")

    def _tick(self) -> None:
        """Follow services and jobs."""
        if self.troubles.tick():
            self._struck_s = self._records.now_s
        try:
            listed = self.rest.get("/v1/jobs", limit=200)["jobs"]
            states = {entry["id"]: entry for entry in listed}
            for job in self.jobs.values():
                if job.id in states and (job.open or not job.checked or states[job.id]["state"] != job.state):
                    self._follow(job, states[job.id])
        except Away:
            return

    def _follow(self, job: SoakJob, entry: dict[str, Any]) -> None:
        state, steps = entry["state"], entry["policy_version"]
        if (state, steps) != (job.state, job.steps):
            self._records.note("job", id=job.id, state=state, steps=steps, error=entry["error"])
            stepped = steps > job.steps
            job.state, job.steps, job.checked = state, steps, False
            job.ended_s = None if job.open else self._records.now_s
            if stepped or not job.open:
                self._moved_s = self._records.now_s
        if job.open:
            job.watcher.follow()
            self._follow_open(job)
        elif not job.checked:
            self._progress.forget(job.number)
            if self._still_watched(job):
                return
            for fault in outcome.outcome_faults(job.recipe, state, entry["error"] or "", job.asked):
                self._records.violation("outcome", f"job {job.id}: {fault}")
            look(job, self.rest, self._records)
            job.checked = True

    def _still_watched(self, job: SoakJob) -> bool:
        """Whether the watcher of an ended job has not heard of the end yet, which it must soon."""
        late_s = self._records.now_s - (job.ended_s or 0.0) - progress.EXPLAIN_S * self.troubles.pace
        if job.watcher.finished or not self.troubles.calm:
            return not job.watcher.finished
        if late_s > 0:
            self._records.violation(
                "streams", f"the watcher of {job.id} does not hear of its end: {job.watcher.ids[-3:]}"
            )
        return late_s <= 0

    def _follow_open(self, job: SoakJob) -> None:
        """Have a job that stands still explain itself, and end one that cannot work."""
        status = self.rest.get(f"/v1/jobs/{job.id}/status")
        mark = (job.state, job.steps, status["phase"], status["jobs_ahead"], status["consumed"])
        still_s = self._progress.observe(job.number, self._records.now_s, mark, calm=self.troubles.calm)
        lingers_s = still_s / min(self.troubles.pace, 2.0)
        still_s /= self.troubles.pace
        if job.state in ("queued", "paused"):
            waits = progress.explanation(status)
            if job.state == "queued" and still_s > progress.EXPLAIN_S and not waits:
                self._records.violation("progress", f"job {job.id} is queued without a word: {status}")
            return
        if still_s > progress.EXPLAIN_S and not progress.explanation(status):
            self._records.violation("progress", f"job {job.id} stands still for {still_s:.0f} s and says nothing")
        if not job.recipe.good and lingers_s > progress.LINGER_S:
            self._end_lingering(job, status)
        elif still_s > progress.HANG_S and "cancel" not in job.asked:
            self._records.violation("progress", f"job {job.id} stands still for {still_s:.0f} s: {status}")
            self._act(job, "cancel")

    def _end_lingering(self, job: SoakJob, status: dict[str, Any]) -> None:
        events = self.rest.text(f"/v1/jobs/{job.id}/events", follow="false")
        said = f"{progress.explanation(status)}\n{events}"
        if re.search(job.recipe.because, said, re.IGNORECASE) is None:
            self._records.violation("progress", f"job {job.id} cannot work and does not say why: {said[:1500]}")
        if "cancel" not in job.asked:
            self._records.note("lingers", id=job.id, says=progress.explanation(status))
            self._act(job, "cancel")
