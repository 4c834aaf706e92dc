"""verdict.py OUTDIR: prints a line for each Autobahn case that is not OK, then the counts. Exit status
1 if a case FAILED, is UNCLEAN or UNIMPLEMENTED, was closed with a wrong code, or has no result.

OUTDIR contains expected.json (case ids), index.json and the reports of the fuzzing client."""
import collections
import json
import os
import sys

# The result of a case is the worse one of its behaviour and of how its connection ended.
RANK = ["OK", "INFORMATIONAL", "NON-STRICT", "UNIMPLEMENTED", "UNCLEAN", "FAILED"]
# "FAILED BY CLIENT": the server waited for the client to close TCP first.
ENDINGS = {
    "OK": "OK",
    "INFORMATIONAL": "INFORMATIONAL",
    "FAILED BY CLIENT": "NON-STRICT",
    "UNCLEAN": "UNCLEAN",
    "WRONG CODE": "FAILED",
}
BAD = ("UNIMPLEMENTED", "UNCLEAN", "FAILED")


def load(path, default):
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError):
        return default


def reason(out, result):
    report = load(os.path.join(out, result["reportfile"]), {})
    pairs = (("behavior", "result"), ("behaviorClose", "resultClose"))
    said = [report.get(text, "") for verdict, text in pairs if result[verdict] != "OK"]
    return "; ".join(text for text in said if text)


def main(out):
    expected = load(os.path.join(out, "expected.json"), [])
    results = load(os.path.join(out, "index.json"), {}).get("server", {})
    counts = collections.Counter()
    for case in expected:
        result = results.get(case)
        if result is None:
            counts["FAILED"] += 1
            print("FAILED", case, "no result")
            continue
        behaviour = result["behavior"]
        behaviour = behaviour if behaviour in RANK else "FAILED"
        ending = ENDINGS.get(result["behaviorClose"], "FAILED")
        verdict = max(behaviour, ending, key=RANK.index)
        counts[verdict] += 1
        if verdict != "OK":
            print(verdict, case, "close code", result["remoteCloseCode"], reason(out, result))
    parts = ", ".join("%s %d" % (verdict, counts[verdict]) for verdict in RANK)
    print("autobahn: %d cases: %s" % (len(expected), parts))
    return 1 if not expected or any(counts[verdict] for verdict in BAD) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
