"""The template engine against Go's own, which the docker CLI holds: `docker context inspect --format` evaluates any
template without an engine, over data from a file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable

import pytest

from swarm.gotemplate import Template, TemplateError

pytestmark = pytest.mark.skipif(shutil.which("docker") is None, reason="needs the docker CLI")

DATA = {
    "A": {"b": "c", "d": "e"},
    "L": ["x", "y", "z"],
    "M": [{"k": "v", "n": 1.5}, {"k": "w"}],
    "N": None,
    "E": {},
    "F": 1.5,
    "B": True,
    "S": 'täst "q" <&\'> \t=\\ ',
    "Z": "",
    "O": [],
}
WHOLE = {"Metadata": {"Metadata": {"AdditionalFields": DATA}}}
HEAD = "{{$d := .Metadata.Metadata.AdditionalFields}}"
MARK = "\n=====\n"

Docker = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Docker:
    folder = tmp_path_factory.mktemp("docker")
    meta = folder / "contexts/meta" / hashlib.sha256(b"t").hexdigest()
    meta.mkdir(parents=True)
    (meta / "meta.json").write_text(
        json.dumps({"Name": "t", "Metadata": DATA, "Endpoints": {"docker": {"Host": "unix:///x"}}})
    )

    def inspect(form: str) -> subprocess.CompletedProcess[str]:
        command = ["docker", "--config", str(folder), "context", "inspect", "t", "--format", form]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)

    return inspect


RIGHT = r"""
{{$d.A.b}} {{$d.A}} {{$d.L}} {{$d.M}} {{$d.F}} {{$d.B}} {{$d.E}} {{$d.O}}
{{$d.N}}|{{$d.A.none}}|{{print nil}}|{{printf "%v" $d.N}}
{{index $d.A "b"}}|{{index $d.L 1}}|{{index $d.M 0 "k"}}|{{(index $d.M 0).k}}|{{index "abc" 1}}
{{len $d.L}} {{len $d.A}} {{len "ä"}} {{slice "abcdef" 1 3}} {{slice "abc" 1}} {{slice $d.L 1 2}} {{slice $d.L 0 1 2}}
{{if $d.A}}a{{end}}{{if $d.E}}b{{else}}c{{end}}{{if $d.N}}d{{else if $d.F}}e{{else}}f{{end}}{{if $d.Z}}g{{else if 0}}h{{else}}i{{end}}
{{with $d.A}}{{.b}}{{end}}{{with $d.Z}}{{.}}{{else}}none{{end}}{{with $d.Z}}1{{else with $d.F}}{{.}}{{else}}2{{end}}
{{with $x := $d.A.b}}{{$x}}{{.}}{{end}}{{if $x := $d.Z}}{{else if $y := $d.F}}{{$y}}{{$x}}{{end}}
{{range $d.L}}{{.}},{{end}}{{range $i, $e := $d.L}}{{$i}}{{$e}}{{end}}{{range $k, $v := $d.A}}{{$k}}={{$v}};{{end}}
{{range $d.O}}x{{else}}empty{{end}}{{range 3}}{{.}}{{end}}{{range $i := 2}}{{$i}}{{end}}{{range $x := $d.L}}{{$x}}{{end}}{{range $d.N}}x{{else}}nil{{end}}
{{range $d.L}}{{if eq . "y"}}{{continue}}{{end}}{{.}}{{end}}{{range $d.L}}{{if eq . "y"}}{{break}}{{end}}{{.}}{{end}}
{{$n := 1}}{{range $d.L}}{{$n = .}}{{end}}{{$n}}{{$n := 5}}{{if true}}{{$n := 6}}{{$n = 7}}{{end}}{{$n}}{{$i := 0}}{{range $i = $d.L}}{{end}}{{$i}}
{{define "t"}}[{{.}}{{$}}]{{end}}{{template "t" $d.A.b}}{{template "t"}}{{range $d.L}}{{template "t" .}}{{end}}
{{block "u" $d.F}}<{{.}}>{{end}}{{template "u" 2}}{{define "v"}}1{{end}}{{define "v"}} {{end}}{{template "v"}}
{{define "rec"}}{{.}}{{if lt (len .) 4}}{{template "rec" (print . "a")}}{{end}}{{end}}{{template "rec" "a"}}
a {{- /* c */ -}} b{{/* }} */}}c {{- 3 -}} d {{-3}} {{- " " -}}   {{"x" -}}  e
{{/* a comment */ -}}
  x {{- ""}}  {{"\n" -}}   y
{{"a\tb\"\\\x41\u00e4\101'"}}{{`raw\n"`}}{{'a'}}{{'\n'}}{{'ä'}}{{'\''}}{{'\x41'}}
{{1}} {{-1}} {{+1}} {{0x1F}} {{0b11}} {{0o17}} {{017}} {{1_000}} {{1.5}} {{1e3}} {{.5}} {{1.}} {{0x1p-2}} {{-0.0}} {{1e+06}} {{1e21}} {{123456.789}} {{1e-5}} {{0.0001}} {{1.5e-7}} {{100000.0}}
{{true}} {{false}} {{not true}} {{and 1 0 2}} {{and 1 2}} {{or 0 "" 3}} {{or 0 ""}} {{and false (index $d.L 99)}} {{or true (index $d.L 99)}} {{0 | and 1}}
{{eq 1 1}} {{eq 1 2 1}} {{ne "a" "b"}} {{lt 1 2}} {{le 2 2}} {{gt "b" "a"}} {{ge 1.5 1.5}} {{eq true true}} {{eq $d.A.b "c"}} {{eq nil nil}} {{eq $d.F 1.5}} {{lt -1 0}}
{{print 1 2 "a" 3 4.5 true}} {{print "a" "b"}} {{println "a" 1}}{{print}} {{println}}|{{print 1 true}} {{print nil 1}}
{{"x" | print "a" | printf "%s-%s" "b"}} {{(print 1 2) | len}} {{"abc" | len | printf "%d"}} {{(("x"))}}
{{html "<a href='x'>\"&\x00</a>"}} {{js "it's \"<x>\" = & \\ \n ä \u2028"}} {{urlquery "a b&c=d/é~-_.*"}} {{html 1 2 "a"}}
{{printf "%d|%5d|%-5d|%05d|%+d|% d|%x|%X|%#x|%o|%#o|%O|%b|%c|%q|%U|%#U|%.3d|%8.3d|%v|%+v|%#v" 42 42 42 42 42 42 255 255 255 8 8 8 5 65 65 65 65 7 7 3 3 3}}
{{printf "%d|%x|%05d|%+d|%#x" -42 -255 -42 -42 -255}}
{{printf "%f|%.2f|%8.2f|%-8.2f|%08.2f|%+.1f|%e|%E|%.2e|%g|%G|%.3g|%v|%6.1f%%" 3.14159 3.14159 3.14159 3.14159 -3.14159 3.14159 314159.0 314159.0 314159.0 1e21 1e-7 1234.5678 2.5 99.5}}
{{printf "%s|%10s|%-10s|%.2s|%q|%+q|%#q|%x|%X|% x|%#x|%v|%#v|%5q|%05s" "hé" "hé" "hé" "héllo" "h\"é\n\x01" "hé" "raw" "hi" "hi" "hi" "hi" "v" "v" "a" "ab"}}
{{printf "%t|%v|%5t|%q|%s|%d" true false true $d.L $d.L $d.L}}
{{printf "%v|%+v|%s|%T|%T|%T|%T|%T" $d.A $d.A $d.A 1 "a" 1.5 true nil}}
{{printf "%d" "x"}}{{printf "%s" 1}}{{printf "%d"}}{{printf "%s" "a" "b" 1}}{{printf "%!"}}{{printf "%z" 1}}{{printf "100%%"}}{{printf "%"}}
{{printf "%[2]d %[1]d|%[1]d %d|%[5]d|%*d|%-*d|%.*f|%[3]*.[2]*[1]f" 1 2 3}}
{{printf "%*d|%-*d|%.*f" 5 1 5 2 2 3.14159}}|{{printf "%[3]*.[2]*[1]f" 12.0 2 6}}|{{printf "%[1]d %d %[1]d" 1 2}}
{{printf "%6.2f|%6s|%6v|%x" 1.5 $d.B $d.L $d.L}}
{{printf "%v %s" nil nil}} {{printf "%s" $d.S}} {{printf "%q" $d.S}}
{{json $d.A}} {{json $d.L}} {{json "a<b"}} {{join (split "a,b" ",") "-"}} {{upper "a"}} {{lower "A"}} {{title "ab cd"}} {{split "a,b" ","}} {{pad "x" 1 2}} {{truncate "abcdef" 3}}
{{- if and (eq (len $d.L) 3) (or $d.N (not $d.Z)) -}} yes {{- end}}
{{$x := 1}}{{$y := print $x 2}}{{$y}}{{with $d}}{{$x}}{{.A.b}}{{$d.A.d}}{{end}}
{{ $d.A.b | printf "%s" }}{{	$d.A.b	}}{{
 $d.A.b
 }}
{{range $i, $m := $d.M}}{{with $m}}{{if .n}}{{.n}}{{else}}{{$i}}{{end}}{{end}}{{end}}
{{index $d.L 0 | printf "%s%s" "a"}}|{{len (slice $d.L 1)}}
{{break}}
""".strip("\n")


def pieces() -> list[str]:
    """Lines of RIGHT; an action may go on over the end of one."""
    out = [""]
    for line in RIGHT.split("\n")[:-1]:
        open_ = out[-1].count("{{") > out[-1].count("}}")
        if open_ or line.startswith("  x"):
            out[-1] += "\n" + line
        else:
            out.append(line)
    return out[1:]


def test_templates_print_what_gos_engine_prints(docker: Docker) -> None:
    from cli.template import Template as CliTemplate

    wrong = []
    for piece in pieces():
        done = docker(HEAD + piece + "|")
        if done.returncode:
            wrong.append(f"{piece}\n docker refuses: {done.stderr.strip()}")
            continue
        try:
            said = CliTemplate(HEAD + piece + "|").render(WHOLE)
        except TemplateError as error:
            said = f"refused: {error}"
        if said != done.stdout.removesuffix("\n"):
            wrong.append(f"{piece}\n go:   {done.stdout!r}\n ours: {said!r}")
    assert not wrong, "\n".join(wrong)


WRONG = [
    "{{",
    "{{.A",
    "}}{{end}}",
    "{{if 1}}",
    "{{if}}x{{end}}",
    "{{if 1}}{{else}}{{else}}{{end}}",
    "{{if 1}}{{else with 1}}{{end}}",
    "{{range 1}}{{else if 1}}{{end}}",
    "{{range}}{{end}}",
    "{{range 1.5}}{{end}}",
    '{{range "abc"}}{{end}}',
    "{{range true}}{{end}}",
    "{{break}}",
    "{{range 2}}{{define `x`}}{{end}}{{end}}",
    "{{template}}",
    "{{template x}}",
    '{{template "nope"}}',
    '{{block "x"}}{{end}}',
    "{{define}}{{end}}",
    '{{define "x"}}',
    '{{if 1}}{{define "x"}}{{end}}{{end}}',
    "{{nope}}",
    "{{if false}}{{nope}}{{end}}",
    "{{$x}}",
    "{{if 1}}{{$x := 1}}{{end}}{{$x}}",
    "{{$x = 1}}",
    "{{$x, $y := 1}}",
    "{{range $a, $b, $c := .}}{{end}}",
    "{{1 | 2}}",
    "{{1 2}}",
    "{{nil}}",
    "{{nil.X}}",
    "{{true.X}}",
    '{{"a".B}}',
    "{{(1}}",
    "{{1)}}",
    '{{"a}}',
    "{{`a}}",
    "{{'a}}",
    "{{'ab'}}",
    "{{''}}",
    r'{{"\q"}}',
    r"{{'\"'}}",
    "{{1a}}",
    "{{1..2}}",
    "{{0x}}",
    "{{09}}",
    "{{99999999999999999999}}",
    "{{1e999}}",
    "{{#}}",
    "{{$d.A-b}}",
    "{{.a,.b}}",
    '{{printf"x"}}',
    "{{/* a }}",
    "{{/* a */ b}}",
    "{{| 1}}",
    "{{}}",
    "{{end}}",
    "{{else}}",
    "{{eq}}",
    "{{eq 1}}",
    '{{eq 1 "a"}}',
    "{{eq $d.A $d.A}}",
    "{{lt true false}}",
    "{{lt 1 nil}}",
    '{{lt 1 "a"}}',
    "{{not}}",
    "{{not 1 2}}",
    "{{and}}",
    "{{len 1}}",
    "{{len nil}}",
    "{{index $d.L 3}}",
    "{{index $d.L -1}}",
    '{{index $d.L "a"}}',
    "{{index 1 1}}",
    "{{index $d.A 1}}",
    '{{slice "abc" 2 1}}',
    '{{slice "abc" 0 4}}',
    '{{slice "abc" 0 1 2}}',
    "{{slice 1 2}}",
    "{{call 1}}",
    "{{printf}}",
    "{{printf 1}}",
    "{{$d.A.b.c}}",
    "{{$d.A 1}}",
    "{{1 | $d.F}}",
    "{{.Nope}}",
    "{{with 1}}{{.X}}{{end}}",
]


def test_templates_that_gos_engine_refuses_are_refused(docker: Docker) -> None:
    taken = []
    for piece in WRONG:
        if not docker(HEAD + piece).returncode:
            taken.append(f"docker takes {piece}")
        try:
            taken.append(f"{piece} gives {Template(HEAD + piece).render(WHOLE)!r}")
        except TemplateError:
            continue
    # What is refused here on records only, because maps have any key.
    assert [t for t in taken if "{{.Nope}}" not in t and "{{nil.X}}" not in t] == []
