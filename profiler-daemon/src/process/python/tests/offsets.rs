//! Where structures have their fields. Oracle: `offsetof`, by the compiler and each version's own headers.

use super::*;
use profiler_common::{CONTEXT_ENTERED, CONTEXT_PREVIOUS, CONTEXT_VERSION};

/// What `offsetof` says, by name.
const OFFSETS: &str = r#"
#define Py_BUILD_CORE 1
#include <Python.h>
#include <stddef.h>
#include <internal/pycore_context.h>
#include <stdio.h>
#if PY_VERSION_HEX < 0x030b0000
#include <frameobject.h>
#include <internal/pycore_pystate.h>
#else
#include <internal/pycore_frame.h>
#endif
#if PY_VERSION_HEX >= 0x03090000
#include <internal/pycore_runtime.h>
#endif
#if PY_VERSION_HEX >= 0x030e0000
#include <internal/pycore_interpframe.h>
#endif
#define O(name, type, field) printf(name " %zu\n", offsetof(type, field))
int main(void) {
#if PY_VERSION_HEX < 0x030c0000
    O("tss", _PyRuntimeState, gilstate.autoTSSkey);
#if PY_VERSION_HEX >= 0x030a0000
    O("current", _PyRuntimeState, gilstate.tstate_current);
#if PY_VERSION_HEX < 0x030b0000
    O("tstate_cframe", PyThreadState, cframe);
#endif
#endif
#else
    O("tss", _PyRuntimeState, autoTSSkey);
#endif
    O("key", Py_tss_t, _key);
    O("tstate_context", PyThreadState, context);
    printf("context_version %zu\n", offsetof(PyThreadState, context_ver) - offsetof(PyThreadState, context));
    O("context_previous", PyContext, ctx_prev);
    O("context_entered", PyContext, ctx_entered);
    O("tp_dealloc", PyTypeObject, tp_dealloc);
    O("references", PyObject, ob_refcnt);
    O("type", PyObject, ob_type);
#if PY_VERSION_HEX < 0x030b0000
    O("current_frame", PyThreadState, frame);
    O("frame_code", PyFrameObject, f_code);
    O("frame_previous", PyFrameObject, f_back);
    O("frame_instr", PyFrameObject, f_lasti);
#else
    O("frame_previous", _PyInterpreterFrame, previous);
    O("code_bytecode", PyCodeObject, co_code_adaptive);
#if PY_VERSION_HEX < 0x030d0000
    O("tstate_cframe", PyThreadState, cframe);
    O("current_frame", _PyCFrame, current_frame);
    O("frame_code", _PyInterpreterFrame, f_code);
    O("frame_instr", _PyInterpreterFrame, prev_instr);
#else
    O("current_frame", PyThreadState, current_frame);
    O("frame_code", _PyInterpreterFrame, f_executable);
    O("frame_instr", _PyInterpreterFrame, instr_ptr);
    O("debug_offsets", _PyRuntimeState, debug_offsets);
#endif
#if PY_VERSION_HEX < 0x030c0000
    O("frame_entry", _PyInterpreterFrame, is_entry);
#else
    O("frame_entry", _PyInterpreterFrame, owner);
#if PY_VERSION_HEX < 0x030e0000
    printf("owner %d\n", FRAME_OWNED_BY_CSTACK);
#else
    printf("owner %d\n", FRAME_OWNED_BY_INTERPRETER);
#endif
#endif
#endif
#ifdef CO_NO_MONITORING_EVENTS
    printf("internal %d\n", CO_NO_MONITORING_EVENTS);
#endif
    O("code_argcount", PyCodeObject, co_argcount);
    O("code_kwonly", PyCodeObject, co_kwonlyargcount);
    O("code_flags", PyCodeObject, co_flags);
    O("code_firstline", PyCodeObject, co_firstlineno);
    O("filename", PyCodeObject, co_filename);
#if PY_VERSION_HEX < 0x030b0000
    O("name", PyCodeObject, co_name);
#else
    O("name", PyCodeObject, co_qualname);
#endif
#if PY_VERSION_HEX < 0x030a0000
    O("lines", PyCodeObject, co_lnotab);
#else
    O("lines", PyCodeObject, co_linetable);
#endif
    O("bytes_size", PyVarObject, ob_size);
    O("bytes_data", PyBytesObject, ob_sval);
    O("text_length", PyASCIIObject, length);
    O("text_state", PyASCIIObject, state);
    printf("text_ascii %zu\ntext_compact %zu\n", sizeof(PyASCIIObject), sizeof(PyCompactUnicodeObject));
    O("tp_members", PyTypeObject, tp_members);
}
"#;

/// The table, by the same names.
fn named(layout: &Layout) -> BTreeMap<&'static str, u64> {
    let (w, c) = (&layout.walk, &layout.code);
    let fields = [
        ("tstate_cframe", w.tstate_cframe),
        ("current_frame", w.current_frame),
        ("frame_code", w.frame_code),
        ("frame_previous", w.frame_previous),
        ("frame_instr", w.frame_instr),
        ("frame_entry", w.frame_entry),
        ("tstate_context", w.tstate_context),
        ("code_argcount", w.code_argcount),
        ("code_kwonly", w.code_kwonly),
        ("code_flags", w.code_flags),
        ("code_firstline", w.code_firstline),
        ("code_bytecode", w.code_bytecode),
        ("filename", c.filename),
        ("name", c.name),
        ("lines", c.lines),
        ("bytes_size", c.bytes_size),
        ("bytes_data", c.bytes_data),
        ("text_length", c.text_length),
        ("text_state", c.text_state),
        ("text_ascii", c.text_ascii),
        ("text_compact", c.text_compact),
    ];
    let mut named: BTreeMap<_, _> =
        fields.into_iter().filter(|(_, at)| *at != NO_FIELD).map(|(name, at)| (name, at.into())).collect();
    named.insert("tss", layout.tss);
    named.extend(layout.current.map(|at| ("current", at)));
    named.insert("key", 4);
    named.insert("tp_members", 240);
    named.insert("context_version", CONTEXT_VERSION);
    named.insert("context_previous", CONTEXT_PREVIOUS);
    named.insert("context_entered", CONTEXT_ENTERED);
    named.insert("tp_dealloc", deaths::TP_DEALLOC);
    named.insert("references", layout::OBJECT_REFERENCES.into());
    named.insert("type", layout::OBJECT_TYPE.into());
    named
}

/// Oracle: the compiler, with the version's own headers. Both the table and what the interpreter says of itself.
fn offsets_agree_with_the_headers(interpreter: &Interpreter) -> Result<(), String> {
    if interpreter.headers.is_empty() {
        return Err(format!("{} has no headers", interpreter.name()));
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, binary) = (dir.path().join("o.c"), dir.path().join("o"));
    std::fs::write(&source, OFFSETS).unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(interpreter.headers.iter().map(|folder| format!("-I{}", folder.display())));
    let built = compiler.arg("-w").arg("-o").arg(&binary).arg(&source).output();
    let built = built.map_err(|error| format!("no C compiler: {error}"))?;
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let output = Command::new(&binary).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut theirs: BTreeMap<&str, u64> = text
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(name, at)| (name, at.parse().unwrap()))
        .collect();
    let version = version_of(interpreter);
    assert_eq!(theirs.remove("owner"), (version.minor >= 12).then_some(OWNER_INTERPRETER.into()));
    assert_eq!(theirs.remove("debug_offsets"), (version.minor >= 13).then_some(0));
    let internal = theirs.remove("internal");
    assert!(internal.is_none_or(|bit| bit == u64::from(CODE_INTERNAL)), "{internal:?}");
    let table = layout::layout(version).unwrap();
    assert_eq!(named(&table), theirs);

    // From nothing that is right in the table, the interpreter's own account gives back what it lists.
    let python = Python::start(interpreter, "print('ready', flush=True); import sys; sys.stdin.readline()");
    let located = locate(python.pid(), &Maps::read(python.pid()).unwrap()).unwrap().unwrap();
    let memory = ProcessMemory::new(python.pid());
    assert_eq!(located.layout(&memory).unwrap(), table);
    let mut said = table;
    let (walk, code) = (&mut said.walk, &mut said.code);
    for field in
        [&mut walk.code_argcount, &mut walk.code_kwonly, &mut walk.code_flags, &mut walk.code_firstline]
    {
        *field = 0;
    }
    (code.filename, code.name, code.lines) = (0, 0, 0);
    if version.minor < 10 {
        (walk.frame_code, walk.frame_previous, walk.frame_instr) = (0, 0, 0);
    }
    members::apply_code(&memory, located.code_type.unwrap(), &mut said);
    members::apply_frame(&memory, located.frame_type.unwrap(), &mut said);
    assert_eq!(said, table, "by members");
    if version.minor >= 13 {
        let mut said = table;
        let (walk, code) = (&mut said.walk, &mut said.code);
        (walk.current_frame, walk.frame_code, walk.frame_previous, walk.frame_instr) = (1, 1, 1, 1);
        (walk.frame_entry, walk.code_argcount, walk.code_firstline, walk.code_bytecode) = (1, 1, 1, 1);
        (code.filename, code.name, code.lines, code.bytes_size, code.bytes_data) = (1, 1, 1, 1, 1);
        (code.text_length, code.text_state, code.text_ascii, code.text_compact) = (1, 1, 1, 1);
        located.debug_offsets.as_ref().unwrap().apply(&mut said).unwrap();
        assert_eq!(said, table, "by debug offsets");
    }
    Ok(())
}
on_each_version!(offsets_agree_with_the_headers);
