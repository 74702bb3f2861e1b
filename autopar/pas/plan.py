"""Plan: which op is split how on which mesh axis. Pure data, JSON on disk, editable by hand.
Must not know rules or lowering: whether a plan is legal is decided by pas/resolve.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autopar.errors import PlanError
from autopar.ir.mesh import Mesh

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """A parallel plan.

    ops: address -> {axis: choice}. An address is an op id with its module path, 'model.layers.0.mlp.up_proj/linear', or
        a pattern where `*` stands for one path component ('model.layers.*.mlp.up_proj/*') and `**` for any number.
        Later entries win over earlier ones. A choice is a factor name of the op, 'I', 'R', 'P' or 'P:<group>'.
        Ops no entry names are 'I' on every axis.
    params: parameter name or pattern -> {axis: 'R' | 'I' | 'S(d)'}, where placement differs from what the uses imply.
    graph: fingerprint of the graph the plan was made for ('' fits any graph on which all addresses match).
    """

    mesh: Mesh = Mesh()
    ops: dict[str, dict[str, str]] = field(default_factory=dict)
    params: dict[str, dict[str, str]] = field(default_factory=dict)
    graph: str = ""
    policy: str = ""  # what made it, for people

    def to_json(self) -> str:
        """The text saved as plan.json: one op per line, stable order."""
        rows = lambda d: "{\n" + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in d.items()) + "\n  }" if d else "{}"  # noqa: E731
        return (
            "{\n"
            f'  "format": {FORMAT},\n'
            f'  "policy": {json.dumps(self.policy)},\n'
            f'  "graph": {json.dumps(self.graph)},\n'
            f'  "mesh": {json.dumps(dict(self.mesh.axes))},\n'
            f'  "ops": {rows(self.ops)},\n'
            f'  "params": {rows(self.params)}\n'
            "}\n"
        )

    @staticmethod
    def from_json(text: str, source: str = "plan") -> Plan:
        """Parse plan.json. Raises PlanError that says what is wrong and where."""
        try:
            data: Any = json.loads(text)
        except json.JSONDecodeError as e:
            raise PlanError(f"{source} is not valid JSON: {e.msg} at line {e.lineno}, column {e.colno}") from e
        if not isinstance(data, dict) or "format" not in data:
            raise PlanError(f"{source} is not an autopar plan: it has no 'format' field")
        if data["format"] != FORMAT:
            raise PlanError(f"{source} has plan format {data['format']!r}; this version reads format {FORMAT}")
        known = {"format", "policy", "graph", "mesh", "ops", "params"}
        if extra := sorted(set(data) - known):
            raise PlanError(f"{source} has unknown fields {', '.join(extra)}; known are {', '.join(sorted(known))}")
        for key in ("ops", "params"):
            table = data.get(key, {})
            if not isinstance(table, dict):
                raise PlanError(f"{source}: {key!r} must be an object of address -> {{axis: choice}}")
            for address, entry in table.items():
                if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
                    raise PlanError(f"{source}: {key}[{address!r}] must be an object of axis -> text, got {entry!r}")
        mesh = data.get("mesh", {})
        if not isinstance(mesh, dict) or not all(isinstance(v, int) for v in mesh.values()):
            raise PlanError(f"{source}: 'mesh' must be an object of axis name -> size, got {mesh!r}")
        return Plan(Mesh(tuple(mesh.items())), data.get("ops", {}), data.get("params", {}), data.get("graph", ""), data.get("policy", ""))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json())

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan file. Raises PlanError if it is missing or malformed."""
        try:
            return Plan.from_json(Path(path).read_text(), str(path))
        except OSError as e:
            raise PlanError(f"cannot read plan {path}: {e.strerror}") from e
        except UnicodeDecodeError as e:
            raise PlanError(f"{path} is not text: {e.reason} at byte {e.start}") from e

    def __or__(self, other: Plan) -> Plan:
        """This plan with another's entries on top (they win). Meshes must be equal."""
        if self.mesh != other.mesh:
            raise PlanError(f"cannot merge plans of different meshes: {self.mesh} and {other.mesh}")
        return replace(self, ops={**self.ops, **other.ops}, params={**self.params, **other.params})
