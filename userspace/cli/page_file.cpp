// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/page_file.h"

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <utility>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fmt/format.h>

#include "cli/parse.h"
#include "sink/stream.h"
#include "source/descriptor.h"

namespace finrace {

namespace {

/// Whether it holds nothing, or begins as a page does.
bool may_be_replaced(const std::string& path)
{
    constexpr std::string_view beginning = "<!DOCTYPE html>";
    std::array<char, beginning.size()> bytes{};
    const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
    const ssize_t count = file ? ::read(file.get(), bytes.data(), bytes.size()) : 0;
    return count == 0 || (count > 0 && beginning == std::string_view(bytes.data(), static_cast<std::size_t>(count)));
}

/// rename() would put a page in the place of a device, or of the capture whose name was meant for an input.
void refuse_all_but_files(const std::string& path)
{
    struct stat status {};
    if (::lstat(path.c_str(), &status) != 0)
        return;
    if (S_ISREG(status.st_mode) && !may_be_replaced(path))
        throw UsageError(
            fmt::format("{} is there and holds no page: --html names the page to write; name another", path));
    if (S_ISREG(status.st_mode))
        return;
    throw UsageError(fmt::format("{} is {}: name a file that is new, or a plain one to replace", path,
                                 S_ISLNK(status.st_mode)   ? "a symbolic link"
                                 : S_ISDIR(status.st_mode) ? "a directory"
                                                           : "no plain file"));
}

/// A file of its own beside `path`, gone again unless it takes that name.
class Draft {
public:
    explicit Draft(const std::string& path) : path_(path), name_(path + ".XXXXXX")
    {
        refuse_all_but_files(path);
        fd_ = Descriptor(::mkostemp(name_.data(), O_CLOEXEC)); // O_EXCL: follows no link; mode 0600
        if (!fd_)
            fail();
    }
    ~Draft()
    {
        if (!done_ && fd_)
            ::unlink(name_.c_str());
    }
    Draft(const Draft&) = delete;
    Draft& operator=(const Draft&) = delete;
    Draft(Draft&&) = delete;
    Draft& operator=(Draft&&) = delete;

    void write(std::string_view text) const
    {
        while (!text.empty()) {
            const ssize_t count = ::write(fd_.get(), text.data(), text.size());
            if (count < 0 && errno != EINTR)
                fail();
            text.remove_prefix(count > 0 ? static_cast<std::size_t>(count) : 0);
        }
    }

    void take_place()
    {
        refuse_all_but_files(path_);
        if (::fsync(fd_.get()) != 0 || ::rename(name_.c_str(), path_.c_str()) != 0)
            fail();
        done_ = true;
    }

private:
    [[noreturn]] void fail() const
    {
        throw OutputError(fmt::format("cannot write {}: {}", path_, std::strerror(errno)));
    }

    std::string path_;
    std::string name_;
    Descriptor fd_;
    bool done_ = false;
};

} // namespace

void check_page_file(const std::string& path)
{
    const Draft draft(path);
}

void write_page_file(const std::string& path, const std::string& text)
{
    Draft draft(path);
    draft.write(text);
    draft.take_place();
}

} // namespace finrace
