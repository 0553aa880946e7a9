"""The foot of a report: how it was made."""

from __future__ import annotations

from typing import Any

from llmkern.evaluation.report.view import Block, Code, Content, Paragraph, Section, Table


def section(report: dict[str, Any]) -> Section:
    machine, data, settings = report["machine"], report["data"], report["settings"]
    rows: list[list[Content]] = [
        ["date", machine["date"]],
        ["processor", machine["processor"]],
        ["cores", f"{machine['threads']} of {machine['cores']}, instruction set {machine['instruction_set']}"],
        ["system", machine["system"]],
        ["Python", machine["python"]],
        ["llmkern", machine["llmkern"] + (f", commit {machine['commit']}" if machine["commit"] else "")],
        ["torch", machine["torch"]],
        *([name, version] for name, version in machine["packages"].items()),
        ["data", f"{data['file']}, SHA-256 {data['sha256']}"],
        ["seed", f"{settings['seed']}, of the tokens that speed is measured with and of the order in each round"],
    ]
    blocks: list[Block] = []
    if report["command"]:
        blocks += [Paragraph("The whole report is made again by"), Code("", report["command"], "sh")]
    blocks += [
        Paragraph("The lines of each section stand behind these, which load the models and the data."),
        Code("First, for the lines of any section", report["code"]["first"]),
        Table("Machine, versions, data", ("what", "which"), rows),
        Paragraph("All figures, unrounded, and every module, layer and row of the contract are in the JSON beside this "
                  "page, from which it was written.", note=True),
    ]  # fmt: skip
    return Section("made", "How this was made", blocks)
