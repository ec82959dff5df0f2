/// Files of a bundle: paths that stay inside, digests, and files mapped into memory.
#pragma once

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "error.hpp"
#include "json.hpp"

namespace cpcompile::detail {

namespace fs = std::filesystem;

/// Whether `path` is `folder` or lies within it, by their text.
inline bool within(const fs::path& path, const fs::path& folder) {
    auto part = path.begin();
    for (const fs::path& expected : folder)
        if (!expected.empty() && (part == path.end() || *part++ != expected)) return false;
    return true;
}

/// `root/name`; UsageError if it leaves `root`, by its text or through a link.
inline fs::path inside(const fs::path& root, const std::string& name) {
    const fs::path relative(name);
    bool leaves = relative.is_absolute();
    for (const fs::path& part : relative) leaves = leaves || part == "..";
    try {
        if (name.find('\0') != name.npos) throw std::invalid_argument("a zero byte");
        leaves = leaves || !within(fs::weakly_canonical(root / relative), fs::weakly_canonical(root));
    } catch (const std::exception& error) {  // a loop of links, an invalid character
        const auto* reason = dynamic_cast<const fs::filesystem_error*>(&error);
        if (reason == nullptr || reason->code() != std::errc::filename_too_long) {  // no file can have such a name
            const std::string shown = repr(first(name, 100));
            throw UsageError(root.string() + ": " + shown + " is not a valid path; build the bundle again");
        }
    }
    if (leaves)
        throw UsageError(root.string() + ": the path " + repr(name) +
                         " leaves the bundle, so it is refused; build the bundle again");
    return root / relative.lexically_normal();
}

/// A SHA-256 in the making.
class Sha256 {
 public:
    Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
        if (!context_ || EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1)
            throw Error("OpenSSL offers no SHA-256, which every file of a bundle is checked with");
    }
    void add(std::string_view bytes) { EVP_DigestUpdate(context_.get(), bytes.data(), bytes.size()); }
    std::string hex() {
        std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
        unsigned length = 0;
        EVP_DigestFinal_ex(context_.get(), digest.data(), &length);
        std::string text;
        for (unsigned index = 0; index < length; ++index) {
            text += "0123456789abcdef"[digest[index] >> 4];
            text += "0123456789abcdef"[digest[index] & 15];
        }
        return text;
    }

 private:
    std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

/// UsageError if the file `path` is missing or does not have that SHA-256.
inline void verify_file(const fs::path& path, const std::string& digest) {
    std::error_code failure;
    const fs::file_status status = fs::status(path, failure);
    if (status.type() == fs::file_type::not_found)
        throw UsageError(path.string() + ": is missing from the bundle; build it again or copy it whole");
    if (failure) throw UsageError(path.string() + ": cannot be read (" + failure.message() + ")");
    if (!fs::is_regular_file(status))  // reading a pipe could block, a device may be endless
        throw UsageError(path.string() + ": is not a regular file; build the bundle again or copy it whole");
    std::ifstream file(path, std::ios::binary);
    if (!file) throw UsageError(path.string() + ": cannot be read (" + std::strerror(errno) + ")");
    Sha256 sha;
    for (std::vector<char> block(1 << 18); file;) {
        file.read(block.data(), static_cast<std::streamsize>(block.size()));
        sha.add({block.data(), static_cast<std::size_t>(file.gcount())});
    }
    if (file.bad()) throw UsageError(path.string() + ": cannot be read (" + std::strerror(errno) + ")");
    if (sha.hex() != digest) {
        require_fetched(path);
        throw UsageError(path.string() +
                         ": differs from what was built (digest mismatch); build the bundle again or copy it whole");
    }
}

/// A file mapped into memory for reading. std::system_error: it cannot be opened.
class MappedFile {
 public:
    explicit MappedFile(const fs::path& path) {
        const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
        struct stat status{};
        if (file < 0 || ::fstat(file, &status) != 0) fail(file);
        size_ = static_cast<std::size_t>(status.st_size);
        if (size_ > 0) {
            data_ = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0);
            if (data_ == MAP_FAILED) fail(file);
        }
        ::close(file);
    }
    ~MappedFile() {
        if (size_ > 0) ::munmap(data_, size_);
    }
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    std::string_view bytes() const { return {static_cast<const char*>(data_), size_}; }
    /// Gives its memory back until it is read again.
    void forget() const {
        if (size_ > 0) ::madvise(data_, size_, MADV_DONTNEED);
    }

 private:
    [[noreturn]] static void fail(int file) {
        const int reason = errno;
        if (file >= 0) ::close(file);
        throw std::system_error(reason, std::generic_category());
    }
    void* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace cpcompile::detail
