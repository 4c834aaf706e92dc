"""cases.py OUTDIR URL PATTERN...: writes spec.json for the fuzzing client and expected.json with the
case ids that match the patterns. Exit status 1 if none match. Runs with the suite's Python 2.7."""
import json
import sys

from autobahntestsuite import case
from autobahntestsuite.caseset import CaseSet

out, url, patterns = sys.argv[1], sys.argv[2], sys.argv[3:]
spec = {
    "outdir": out,
    "servers": [{"agent": "server", "url": url, "options": {"version": 18}}],
    "cases": patterns,
    "exclude-cases": [],
    "exclude-agent-cases": {},
}
known = CaseSet(case.CaseSetname, case.CaseBasename, case.Cases, case.CaseCategories, case.CaseSubCategories)
ids = known.parseSpecCases(spec)
if not ids or any(one not in known.CasesById for one in ids):
    sys.exit(1)
for name, value in (("spec", spec), ("expected", ids)):
    with open("%s/%s.json" % (out, name), "w") as file:
        json.dump(value, file, indent=1)
