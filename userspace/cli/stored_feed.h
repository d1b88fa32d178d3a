// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What was stored, of whatever kind, as a feed: recordings or captures, told apart by their first bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <sys/stat.h>

#include "cli/intake.h"
#include "sink/untampered.h"
#include "source/follower.h"

namespace finrace {

/// What a capture tells of itself.
struct CaptureFacts {
    std::string name; ///< the file's
    Vantage vantage;
    CaptureGaps gaps;
    std::uint64_t segments = 0;
    std::uint64_t unreadable = 0;
};

class StoredFeed : public Feed {
public:
    /// Intake's.
    virtual void know(IdleTimers timers) = 0;

    /// Something could not be read on; standard error has been told what.
    [[nodiscard]] virtual bool failed() const = 0;
    /// What is not there, or was not taken in, at least; standard error has been told of each kind.
    [[nodiscard]] virtual std::uint64_t missing() const = 0;
    /// Whether one of the files is what this descriptor refers to.
    [[nodiscard]] virtual bool reads(int descriptor) const = 0;
    /// Of those that have been read.
    [[nodiscard]] virtual const std::vector<CaptureFacts>& captures() const;
};

/// Opens recordings of one run or several, or captures; "-" is standard input. SIGINT and SIGTERM end the reading from
/// now on. `connections`: records of whole connections are to be made of them. Throws UsageError, InputError,
/// RecordingError.
std::unique_ptr<StoredFeed> open_stored(Filter filter, bool connections, const std::vector<std::string>& paths);

/// Whether SIGINT or SIGTERM has come since open_stored().
bool is_told_to_end();

/// Whether `descriptor` is a plain file, and one of `files`.
template <typename Files>
bool is_plain_file_among(int descriptor, const Files& files)
{
    struct stat status {};
    return ::fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode) &&
           std::any_of(files.begin(), files.end(),
                       [descriptor](const auto& file) { return is_same_file(file->descriptor(), descriptor); });
}

} // namespace finrace
