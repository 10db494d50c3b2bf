//! Libraries that are loaded when a container needs them: a machine without them still runs containers that do not.

use std::{
    ffi::{CStr, CString, c_void},
    ptr::NonNull,
};

use crate::error::{Error, Result};

/// A handle of dlopen(3), closed when dropped.
pub(super) struct Library {
    handle: NonNull<c_void>,
    /// For errors: what it is called, what needs it, what brings it.
    words: [String; 3],
}

impl Library {
    /// Loads `name`, which `user` needs and the Debian package `package` brings.
    ///
    /// # Errors
    /// `Unavailable` that says so.
    pub(super) fn open(name: &str, user: &str, package: &str) -> Result<Self> {
        let words = [name, user, package].map(str::to_owned);
        let path = CString::new(name).map_err(|e| unusable(&words).with_source(e))?;
        // SAFETY: the name is a C string. What is loaded is a library of the system, whose initialisation asks nothing of this process.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        match NonNull::new(handle) {
            Some(handle) => Ok(Self { handle, words }),
            None => Err(unusable(&words).with_source(cause())),
        }
    }

    /// The address of a function.
    ///
    /// # Safety
    /// `F` MUST be the type of a pointer to the C function of that name, and MUST NOT be used after the library.
    ///
    /// # Errors
    /// `Unavailable` where the library lacks it.
    pub(super) unsafe fn function<F: Copy>(&self, name: &CStr) -> Result<F> {
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        // SAFETY: the handle is open, the name is a C string.
        let address = unsafe { libc::dlsym(self.handle.as_ptr(), name.as_ptr()) };
        if address.is_null() {
            return Err(unusable(&self.words).with_source(cause()));
        }
        // SAFETY: both are pointers of one size, this one is not null; the type is the caller's promise.
        Ok(unsafe { std::mem::transmute_copy(&address) })
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: opened once, closed once; functions are not used after it (`Library::function`).
        unsafe { libc::dlclose(self.handle.as_ptr()) };
    }
}

fn unusable([name, user, package]: &[String; 3]) -> Error {
    Error::unavailable(format!(
        "cannot use {name}, which {user} needs; install the Debian package {package}"
    ))
}

/// Why the last dlopen(3) or dlsym(3) of this thread failed.
fn cause() -> String {
    // SAFETY: no arguments; the text is this thread's and stays until its next call of the kind.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "unknown cause".to_owned();
    }
    // SAFETY: not null, so it is a C string.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
