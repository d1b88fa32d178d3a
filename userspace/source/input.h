// SPDX-License-Identifier: GPL-2.0-only OR MIT
// A file to read, or standard input, opened once: what it holds shows in its first bytes, which a pipe gives only once.
#pragma once

#include <stdexcept>
#include <string>

#include "source/descriptor.h"

namespace finrace {

/// A file can't be opened or read; the message names it and says why.
struct InputError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// What a file's first bytes say that it is.
enum class InputKind {
    capture,    ///< pcap or pcapng
    compressed, ///< by gzip, xz, zstd or bzip2: neither of our readers reads those
    json,       ///< an object: finrace's own records or report, most likely
    other,      ///< a recording, or nothing that is known
};

struct Input {
    std::string name;      ///< for people
    Descriptor descriptor; ///< behind `head`
    std::string head;      ///< four bytes, or all of a shorter file
    InputKind kind = InputKind::other;
};

/// "-" is standard input. Throws InputError.
Input open_input(const std::string& path);

} // namespace finrace
